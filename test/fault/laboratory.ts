/**
 * The fault laboratory: clients change passwords while a nemesis does harm, and afterwards everything that was
 * answered is compared with what a password is, and with what the database did.
 *
 *   node test/fault/laboratory.ts [--seconds N | --operations N] [--seed S] [--database mariadb|mysql|group] [--mutant NAME]
 */
import { mkdtemp, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import {
  type DatabaseKind,
  type PrivateDatabase,
  startPrivateDatabase,
} from '../support/private_database.ts';
import type { Finding } from './ledger.ts';
import { type FaultName, Nemesis } from './nemesis.ts';
import { Random } from './random.ts';
import { buildStage, LEDGER_SERVER_ARGS, PROJECT, restartUntilItRuns, type Stage } from './stage.ts';
import { type Tally, Workload } from './workload.ts';

export interface LaboratoryOptions {
  seed: number;
  /** Ends when both are reached; absent ones are. */
  seconds?: number;
  operations?: number;
  faults?: number;
  database: PrivateDatabase;
  /** Where the server under test is. */
  root?: string;
  clients?: number;
  clock?: boolean;
  weights?: Partial<Record<FaultName, number>>;
  pauseMs?: number;
  environment?: Record<string, string>;
  progress?: (line: string) => void;
}

export interface LaboratoryReport {
  readonly seed: number;
  readonly seconds: number;
  readonly tally: Tally;
  readonly faults: ReadonlyMap<string, number>;
  readonly faultsTotal: number;
  readonly users: number;
  readonly undecided: number;
  readonly findings: readonly Finding[];
  /** Why a kind of fault could not be done. */
  readonly left: readonly string[];
  /** What the servers logged as errors: the causes of INTERNAL. */
  readonly serverErrors: readonly string[];
}

const PROGRESS_MS = 10_000;
/** However the machine is loaded, a laboratory stops. */
const SECONDS_MAX_FACTOR = 4;

export async function runLaboratory(options: LaboratoryOptions): Promise<LaboratoryReport> {
  const { seed, database, progress = () => {}, clients = 12 } = options;
  const random = new Random(seed);
  const stage = await buildStage({
    databaseUrl: () => database.url(),
    root: options.root ?? PROJECT,
    clock: options.clock ?? true,
    progress,
    ...(options.environment ? { environment: options.environment } : {}),
  });
  try {
    const workload = new Workload(stage, random.fork());
    await workload.prepare();
    const nemesis = new Nemesis(stage, random.fork(), {
      database,
      ...(options.weights ? { weights: options.weights } : {}),
      ...(options.pauseMs ? { pauseMs: options.pauseMs } : {}),
    });
    const start = performance.now();
    const seconds = () => (performance.now() - start) / 1000;
    const isEnough = () =>
      (seconds() >= (options.seconds ?? 0) &&
        workload.tally.total >= (options.operations ?? 0) &&
        nemesis.total >= (options.faults ?? 0)) ||
      seconds() > (options.seconds ?? 600) * SECONDS_MAX_FACTOR;
    const tell = () =>
      progress(
        `${seconds().toFixed(0).padStart(4)} s  ${workload.tally.total} operations, ${nemesis.total} faults, ` +
          `${workload.tally.unknown} unknown, ${workload.findings.length} findings so far`,
      );
    const ticker = setInterval(tell, PROGRESS_MS);
    try {
      await Promise.all([workload.run(clients, isEnough), nemesis.run(isEnough)]);
    } finally {
      clearInterval(ticker);
    }
    tell();
    const elapsed = seconds();
    progress('all is put right again; comparing what was answered with what was done');
    await settle(stage, database);
    const db = await stage.connect();
    const { findings, undecided, changes } = await workload.check(db);
    db.destroy();
    workload.dispose();
    return {
      seed,
      seconds: elapsed,
      tally: workload.tally,
      faults: nemesis.done,
      faultsTotal: nemesis.total,
      users: changes,
      undecided,
      findings,
      left: stage.clock || options.clock === false ? [] : [`clock shifted: ${stage.noClock}`],
      serverErrors: stage.servers.flatMap(({ lines }) =>
        lines.filter((line) => line.includes('"level":"error"') && line.includes('INTERNAL')),
      ),
    };
  } finally {
    await stage.dispose();
  }
}

/** Ends the servers in good order, so that nothing is under way any more, and starts them again. */
async function settle(stage: Stage, database: PrivateDatabase): Promise<void> {
  if (database.pid === undefined) await restartUntilItRuns(database);
  stage.proxy.decide = undefined;
  stage.proxy.resume();
  await Promise.all(stage.servers.map((server) => server.end('SIGTERM')));
  while (stage.proxy.underWay > 0) await sleep(20);
  stage.proxy.cut();
  await stage.waitForCalm();
  await Promise.all(stage.servers.map((server) => server.start()));
}

// ---- the report -------------------------------------------------------------------------------------------------

export function formatReport(report: LaboratoryReport): string {
  const { tally } = report;
  const rows = (counts: ReadonlyMap<string, number>) =>
    [...counts]
      .sort(([a], [b]) => a.localeCompare(b))
      .map(([what, times]) => `    ${String(times).padStart(6)}  ${what}`);
  return [
    `seed ${report.seed}: ${tally.total} operations in ${report.seconds.toFixed(0)} s, ${report.faultsTotal} faults, ${report.users} users`,
    `  operations by kind and outcome (${tally.retries} retries with a key beside them)`,
    ...rows(tally.operations),
    '  answers other than OK, by reason',
    ...rows(tally.reasons),
    '  faults',
    ...rows(report.faults),
    ...report.left.map((line) => `  LEFT OUT  ${line}`),
    `  unknown outcomes: ${tally.unknown}`,
    `  undecided users:  ${report.undecided}`,
    `  violations:       ${report.findings.length}`,
  ].join('\n');
}

/** Writes the findings down. @returns where. */
export async function writeFindings(report: LaboratoryReport): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'rekey-laboratory-'));
  const file = join(directory, `findings-seed-${report.seed}.txt`);
  const text = report.findings.flatMap(({ userId, what, evidence }) => [
    `user ${userId}: ${what}`,
    ...evidence.map((line) => `    ${line}`),
    '',
  ]);
  await writeFile(file, [...text, ...report.serverErrors, ''].join('\n'));
  return file;
}

export const isGood = (report: LaboratoryReport) => report.findings.length === 0 && report.undecided === 0;

export const toStderr = (line: string) => void process.stderr.write(`${line}\n`);

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      seconds: { type: 'string' },
      operations: { type: 'string' },
      faults: { type: 'string' },
      seed: { type: 'string' },
      database: { type: 'string', default: 'mariadb' },
      mutant: { type: 'string' },
    },
  });
  const seed = values.seed === undefined ? Math.floor(Math.random() * 1e9) : Number(values.seed);
  toStderr(`seed ${seed}`);
  if (values.database === 'group') {
    const { formatGroup, runGroup } = await import('./group.ts');
    const report = await runGroup(seed, toStderr);
    process.stdout.write(`${formatGroup(report)}\n`);
    process.exitCode = report.isGood ? 0 : 1;
    return;
  }
  if (values.mutant !== undefined) {
    const { runMutants } = await import('./mutants.ts');
    process.exitCode = (await runMutants([values.mutant], seed, toStderr)).every(({ isCaught }) => isCaught)
      ? 0
      : 1;
    return;
  }
  const database = await startPrivateDatabase({
    kind: values.database as DatabaseKind,
    args: LEDGER_SERVER_ARGS,
  });
  try {
    const report = await runLaboratory({
      seed,
      database,
      progress: toStderr,
      ...(values.seconds === undefined ? {} : { seconds: Number(values.seconds) }),
      ...(values.operations === undefined ? {} : { operations: Number(values.operations) }),
      ...(values.faults === undefined ? {} : { faults: Number(values.faults) }),
      ...(values.seconds === undefined && values.operations === undefined ? { seconds: 60 } : {}),
    });
    process.stdout.write(`${formatReport(report)}\n`);
    if (isGood(report)) return;
    process.stdout.write(`  written to ${await writeFindings(report)}\n`);
    process.exitCode = 1;
  } finally {
    await database.dispose();
  }
}

if (import.meta.main) {
  await main();
  process.exit();
}
