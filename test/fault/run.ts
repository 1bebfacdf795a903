/**
 * Everything of the fault laboratory, one part after the other, and a table of what came of it.
 *
 *   node test/fault/run.ts [PART…]
 *
 * REKEY_FAULT_SEED repeats a run; REKEY_FAULT_SECONDS makes the laboratory on MariaDB as long as one likes.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import { DebianRootError } from '../support/debian.ts';
import { PrivateDatabaseError, startPrivateDatabase } from '../support/private_database.ts';
import { formatGroup, runGroup } from './group.ts';
import {
  formatReport,
  isGood,
  type LaboratoryReport,
  runLaboratory,
  toStderr,
  writeFindings,
} from './laboratory.ts';
import { formatMutants, MUTANTS, runMutants } from './mutants.ts';
import { LEDGER_SERVER_ARGS } from './stage.ts';

const seed = Number(process.env.REKEY_FAULT_SEED ?? Math.floor(Math.random() * 1e9));
const secondsWanted = Number(process.env.REKEY_FAULT_SECONDS ?? 0);

/** What the laboratory must have done before its silence means something. */
const OPERATIONS = 20_000;
const FAULTS = 200;
const SECONDS = 200;
const MYSQL_SECONDS = 60;

interface Result {
  passed: number;
  failed: number;
  skipped: number;
  what: string;
}

const one = (isPassed: boolean, what: string): Result => ({
  passed: isPassed ? 1 : 0,
  failed: isPassed ? 0 : 1,
  skipped: 0,
  what,
});

/** Runs a file of tests; their counts are taken from what the runner says at its end. */
async function testFile(name: string): Promise<Result> {
  const child = spawn(
    process.execPath,
    ['--test', '--test-reporter=spec', fileURLToPath(new URL(name, import.meta.url))],
    {
      env: { ...process.env, REKEY_FAULT_SEED: String(seed) },
      stdio: ['ignore', 'pipe', 'inherit'],
    },
  );
  const lines: string[] = [];
  let rest = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    const parts = (rest + text).split('\n');
    rest = parts.pop() ?? '';
    for (const line of parts) {
      lines.push(line);
      // The totals are told once, by this run as a whole.
      if (!TOTAL.test(line)) process.stdout.write(`${line}\n`);
    }
  });
  const [code] = await once(child, 'close');
  const count = (what: string) =>
    Number(lines.map((line) => TOTAL.exec(line)).find((match) => match?.[1] === what)?.[2] ?? 0);
  const failed = Math.max(count('fail') + count('cancelled'), code === 0 ? 0 : 1);
  const told = lines
    .filter((line) => /^\s*ℹ /.test(line) && !TOTAL.test(line))
    .map((line) => line.trim().slice(2));
  return { passed: count('pass'), failed, skipped: count('skipped'), what: told.join('; ') };
}

const TOTAL = /^(?:ℹ|#) (tests|suites|pass|fail|cancelled|skipped|todo|duration_ms) ([\d.]+)$/;

async function laboratory(kind: 'mariadb' | 'mysql'): Promise<Result> {
  const database = await startPrivateDatabase({ kind, args: LEDGER_SERVER_ARGS });
  try {
    const report = await runLaboratory({
      seed,
      database,
      progress: toStderr,
      ...(kind === 'mariadb'
        ? { seconds: secondsWanted || SECONDS, operations: OPERATIONS, faults: FAULTS }
        : { seconds: MYSQL_SECONDS }),
    });
    process.stdout.write(`${formatReport(report)}\n`);
    if (!isGood(report)) await tellFindings(report);
    const clock: Result =
      report.left.length > 0 ? { passed: 0, failed: 0, skipped: 1, what: report.left.join(' ') } : NOTHING;
    return add(one(isGood(report), summary(report)), clock);
  } finally {
    await database.dispose();
  }
}

const NOTHING: Result = { passed: 0, failed: 0, skipped: 0, what: '' };

const add = (a: Result, b: Result): Result => ({
  passed: a.passed + b.passed,
  failed: a.failed + b.failed,
  skipped: a.skipped + b.skipped,
  what: [a.what, b.what].filter((what) => what !== '').join('; '),
});

const summary = (report: LaboratoryReport) =>
  `${report.tally.total} operations, ${report.faultsTotal} faults, ${report.tally.unknown} unknown, ` +
  `${report.findings.length} violations, ${report.undecided} undecided, ${report.seconds.toFixed(0)} s`;

const SHOWN_MAX = 10;
const LINE_MAX = 600;

/** The first of each kind; all of them are in the file. */
async function tellFindings(report: LaboratoryReport): Promise<void> {
  const kinds = new Map(report.findings.toReversed().map((finding) => [finding.what, finding]));
  for (const { userId, what, evidence } of [...kinds.values()].slice(0, SHOWN_MAX)) {
    process.stdout.write(`user ${userId}: ${what}\n${evidence.map((line) => `    ${line}\n`).join('')}`);
  }
  for (const line of report.serverErrors.slice(0, 3)) process.stdout.write(`${line.slice(0, LINE_MAX)}\n`);
  process.stdout.write(`all of it is in ${await writeFindings(report)}\n`);
}

async function mutants(): Promise<Result> {
  const results = await runMutants(Object.keys(MUTANTS), seed, toStderr);
  process.stdout.write(`${formatMutants(results)}\n`);
  const caught = results.filter(({ isCaught }) => isCaught).length;
  return {
    passed: caught,
    failed: results.length - caught,
    skipped: 0,
    what: `${caught} of ${results.length} caught`,
  };
}

async function group(): Promise<Result> {
  const report = await runGroup(seed, toStderr);
  process.stdout.write(`${formatGroup(report)}\n`);
  const [failover] = report.failovers;
  return one(
    report.isGood,
    `${report.operations} operations, ${report.acknowledged} acknowledged changes, ${report.findings.length} violations; ` +
      `new primary after ${failover?.primarySeconds.toFixed(1)} s, service back after ${failover?.serviceSeconds.toFixed(1)} s`,
  );
}

const PARTS: Readonly<Record<string, () => Promise<Result>>> = {
  checker: () => testFile('register.test.ts'),
  'commit-cuts': () => testFile('commit_cuts.test.ts'),
  crash: () => testFile('crash.test.ts'),
  shutdown: () => testFile('shutdown.test.ts'),
  canaries: () => testFile('canaries.test.ts'),
  laboratory: () => laboratory('mariadb'),
  mutants,
  mysql: () => laboratory('mysql'),
  group,
};

/** MySQL itself can't be had on every machine. */
const NEEDS_MYSQL = new Set(['mysql', 'group']);

async function main(): Promise<void> {
  const names = process.argv.length > 2 ? process.argv.slice(2) : Object.keys(PARTS);
  process.stdout.write(`seed ${seed}\n`);
  const table: string[] = [];
  let total = NOTHING;
  for (const name of names) {
    const part = PARTS[name];
    if (!part) throw new Error(`There is no part "${name}"; there are ${Object.keys(PARTS).join(', ')}.`);
    process.stdout.write(`--- ${name}\n`);
    const start = performance.now();
    let result: Result;
    try {
      result = await part();
    } catch (error) {
      const isAbsent =
        NEEDS_MYSQL.has(name) && (error instanceof PrivateDatabaseError || error instanceof DebianRootError);
      const { message, stack } = error as Error;
      process.stdout.write(`${isAbsent ? `SKIPPED: ${message}` : stack}\n`);
      result = isAbsent
        ? { ...NOTHING, skipped: 1, what: 'MySQL cannot be had here' }
        : one(false, message.split('\n')[0] ?? '');
    }
    const verdict = result.failed > 0 ? 'FAILED' : result.passed > 0 ? 'passed' : 'skipped';
    const seconds = ((performance.now() - start) / 1000).toFixed(0);
    table.push(`${name.padEnd(12)} ${verdict.padEnd(8)} ${seconds.padStart(4)} s  ${result.what}`);
    total = add(total, { ...result, what: '' });
  }
  process.stdout.write(`\nfault laboratory, seed ${seed}\n${table.map((line) => `  ${line}\n`).join('')}`);
  // As the runner of tests says it, for whoever counts over several runs.
  process.stdout.write(`ℹ pass ${total.passed}\nℹ fail ${total.failed}\nℹ skipped ${total.skipped}\n`);
  process.stdout.write(`${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped\n`);
  process.exitCode = total.failed === 0 ? 0 : 1;
}

await main();
process.exit();
