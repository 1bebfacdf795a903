/**
 * A checker that has caught nothing proves nothing. Each mutant is the server with one thing broken on purpose; the
 * laboratory must notice every one.
 *
 *   node test/fault/mutants.ts [--seed S] [NAME…]
 */
import { cp, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { startPrivateDatabase } from '../support/private_database.ts';
import { runLaboratory, toStderr } from './laboratory.ts';
import type { FaultName } from './nemesis.ts';
import { LEDGER_SERVER_ARGS, PROJECT } from './stage.ts';

/** In this file the text, which must stand there exactly once, is replaced by that one. */
type Edit = readonly [file: string, text: string, by: string];

interface Mutant {
  /** What is broken. */
  readonly what: string;
  readonly edits: readonly Edit[];
}

const CHANGE = 'src/password/change_password.ts';
const POOL = 'src/mysql/pool.ts';
const AUDIT = 'src/mysql/audit.ts';
const USERS = 'src/mysql/users.ts';
const SESSIONS = 'src/mysql/sessions.ts';

const ASK_AFTER_COMMIT = `if (await this.#learnWhetherCommitted(wasCommitted, unanswered.result, error))
              return unanswered.result;`;

/** The head of a function that remembers for two seconds what it read. */
const copying = (name: string, parameters: string, given: string, type: string) => `
const copiesOf${name} = new Map<string, { at: number; value: ${type} | undefined }>();
export async function ${name}(db: Executor, ${parameters}): Promise<${type} | undefined> {
  const asked = [${given}].join(' ');
  const copy = copiesOf${name}.get(asked);
  if (copy && performance.now() - copy.at < 2000) return copy.value;
  const value = await really_${name}(db, ${given});
  copiesOf${name}.set(asked, { at: performance.now(), value });
  return value;
}
async function really_${name}(`;

export const MUTANTS: Readonly<Record<string, Mutant>> = {
  'drop-compare': {
    what: 'the new hash is written whatever the stored one is by then',
    edits: [
      [USERS, 'AND u.password_hash = COALESCE(?, u.password_hash)', 'AND COALESCE(?, TRUE) IS NOT NULL'],
      [USERS, 'AND u.password_hash = ? AND NOT u.is_locked', 'AND ? IS NOT NULL AND NOT u.is_locked'],
    ],
  },
  'audit-outside': {
    what: 'the audit record is a statement of its own, outside of the transaction',
    edits: [
      [
        CHANGE,
        "insertAuditRecord(tx, call, { ...event, outcome: 'ok'",
        "insertAuditRecord(deps.database.statements(call.wait), call, { ...event, outcome: 'ok'",
      ],
    ],
  },
  'blind-commit-retry': {
    what: 'a COMMIT without an answer is followed by the whole transaction once more',
    edits: [[POOL, ASK_AFTER_COMMIT, 'void this.#learnWhetherCommitted;']],
  },
  'assume-committed': {
    what: 'a COMMIT without an answer is taken for done',
    edits: [[POOL, ASK_AFTER_COMMIT, 'return unanswered.result;']],
  },
  'assume-not-committed': {
    what: 'a COMMIT without an answer is told as "nothing was changed"',
    edits: [[POOL, ASK_AFTER_COMMIT, "throw new Refusal('CONCURRENT_CHANGE');"]],
  },
  'resolve-without-lock': {
    what: 'whether a COMMIT took effect is asked while it may still be on its way',
    edits: [[AUDIT, ' WHERE audit_id = ? FOR UPDATE', ' WHERE audit_id = ?']],
  },
  'answer-before-commit': {
    what: 'OK is said before the database has confirmed the COMMIT',
    edits: [
      [
        POOL,
        'await connection.commit(RESOLVE_COMMIT_MS);',
        'connection.commit(RESOLVE_COMMIT_MS).catch(() => {});',
      ],
    ],
  },
  'dirty-connection': {
    what: 'a connection is put back with its transaction still open',
    edits: [
      [POOL, '(await connection.isRolledBack(PING_TIMEOUT_MS))', 'connection.isRolledBack !== undefined'],
    ],
  },
  'stale-read': {
    what: 'session and user are read from a copy that is up to two seconds old',
    edits: [
      [
        SESSIONS,
        'export async function findSession(',
        copying('findSession', 'token: string, key: string | undefined', 'token, key', 'Session'),
      ],
      [
        USERS,
        'export async function findUserByName(',
        copying('findUserByName', 'username: string', 'username', 'User'),
      ],
    ],
  },
  'no-recheck': {
    what: 'session and rights are not looked at again within the transaction',
    edits: [
      [CHANGE, 'if (!isEntitled || !(await', 'if (!(await'],
      [
        USERS,
        "AND NOT u.is_locked AND u.approval = 'approved' AND (u.is_super_user OR NOT ?)`",
        'AND ? IS NOT NULL`',
      ],
      [
        USERS,
        'WHERE own.session_id = ? AND own.ended_at IS NULL AND own.expires_at > UTC_TIMESTAMP(6)',
        'WHERE own.session_id = ?',
      ],
    ],
  },
  'no-idempotency': {
    what: 'the idempotency record is written outside of the transaction',
    edits: [
      [
        CHANGE,
        'recordOutcome(tx, session.user.userId',
        'recordOutcome(deps.database.statements(call.wait), session.user.userId',
      ],
    ],
  },
  'ignore-key': {
    what: 'nobody looks whether an idempotency key was seen before',
    edits: [
      [
        CHANGE,
        'if (!earlier || change.request.validateOnly) return undefined;',
        'if (earlier !== null) return undefined;',
      ],
    ],
  },
  'allow-twins': {
    what: 'two calls with one key may both change the password',
    edits: [[CHANGE, "if (!isFirst) throw new Refusal('CONCURRENT_CHANGE');", 'void isFirst;']],
  },
};

/** The project with the mutant's edits, in a directory of its own. */
export async function makeMutant(name: string): Promise<{ root: string; dispose(): Promise<void> }> {
  const mutant = MUTANTS[name];
  if (!mutant) throw new Error(`There is no mutant "${name}"; there are ${Object.keys(MUTANTS).join(', ')}.`);
  const root = await mkdtemp(join(tmpdir(), `rekey-mutant-${name}-`));
  const dispose = () => rm(root, { recursive: true, force: true });
  try {
    for (const part of ['src', 'gen', 'package.json'])
      await cp(join(PROJECT, part), join(root, part), { recursive: true });
    await symlink(join(PROJECT, 'node_modules'), join(root, 'node_modules'));
    for (const [file, text, by] of mutant.edits) {
      const source = await readFile(join(root, file), 'utf8');
      const times = source.split(text).length - 1;
      if (times !== 1)
        throw new Error(
          `Mutant ${name}: its text stands in ${file} ${times} times and not once; bring the mutant up to date:\n${text}`,
        );
      await writeFile(
        join(root, file),
        source.replace(text, () => by),
      );
    }
    return { root, dispose };
  } catch (error) {
    await dispose();
    throw error;
  }
}

export interface MutantResult {
  readonly name: string;
  readonly isCaught: boolean;
  /** How it was noticed, or why it could not be tried. */
  readonly how: string;
  readonly seconds: number;
}

const ROUND_SECONDS = 6;
const ROUNDS_MAX = 5;

/** Many quick faults; what costs seconds each is left to the laboratory itself. */
const WEIGHTS: Partial<Record<FaultName, number>> = {
  'cut around COMMIT': 50,
  'server killed': 1,
  'server frozen': 0,
  'database killed': 0,
  'database restarted': 0,
  'connections stalled': 1,
  'clock shifted': 0,
};

/** Some mutants hold on to what everybody else waits for. */
const IMPATIENT = {
  REKEY_LIMITS_CALL_TIMEOUT_MS: '3000',
  REKEY_LIMITS_SHUTDOWN_GRACE_SECONDS: '1',
};

export async function runMutants(
  names: readonly string[],
  seed: number,
  progress: (line: string) => void,
): Promise<MutantResult[]> {
  const database = await startPrivateDatabase({ kind: 'mariadb', args: LEDGER_SERVER_ARGS, progress });
  const results: MutantResult[] = [];
  try {
    for (const name of names) {
      const start = performance.now();
      let how: string | undefined;
      let isBroken = false;
      try {
        const { root, dispose } = await makeMutant(name);
        try {
          for (let round = 0; round < ROUNDS_MAX && how === undefined; round++) {
            const report = await runLaboratory({
              seed: seed + round,
              seconds: ROUND_SECONDS,
              database,
              root,
              clock: false,
              environment: IMPATIENT,
              clients: 16,
              weights: WEIGHTS,
              pauseMs: 200,
            });
            how = report.findings[0]?.what;
          }
        } finally {
          await dispose();
        }
      } catch (error) {
        isBroken = true;
        how = (error as Error).message;
      }
      const result = {
        name,
        isCaught: how !== undefined && !isBroken,
        how: how ?? 'not noticed',
        seconds: (performance.now() - start) / 1000,
      };
      results.push(result);
      progress(
        `${result.isCaught ? 'caught' : 'MISSED'}  ${name}: ${result.how} (${result.seconds.toFixed(0)} s)`,
      );
    }
  } finally {
    await database.dispose();
  }
  return results;
}

export function formatMutants(results: readonly MutantResult[]): string {
  const width = Math.max(...results.map(({ name }) => name.length));
  return results
    .map(
      ({ name, isCaught, how, seconds }) =>
        `${isCaught ? 'caught' : 'MISSED'}  ${name.padEnd(width)}  ${seconds.toFixed(0).padStart(3)} s  ${MUTANTS[name]?.what}\n${' '.repeat(width + 17)}-> ${how}`,
    )
    .join('\n');
}

if (import.meta.main) {
  const { values, positionals } = parseArgs({
    options: { seed: { type: 'string' } },
    allowPositionals: true,
  });
  const seed = Number(values.seed ?? Math.floor(Math.random() * 1e9));
  toStderr(`seed ${seed}`);
  const results = await runMutants(
    positionals.length > 0 ? positionals : Object.keys(MUTANTS),
    seed,
    toStderr,
  );
  process.stdout.write(`${formatMutants(results)}\n`);
  process.exit(results.every(({ isCaught }) => isCaught) ? 0 : 1);
}
