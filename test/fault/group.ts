/**
 * The laboratory on a MySQL Group Replication group: the primary is killed while clients work, another one takes
 * over, and no acknowledged change may be missing on it.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { PrivateDatabase } from '../support/private_database.ts';
import { startReplicationGroup } from '../support/replication_group.ts';
import type { Finding } from './ledger.ts';
import { Nemesis } from './nemesis.ts';
import { Random } from './random.ts';
import { buildStage } from './stage.ts';
import { Workload } from './workload.ts';

export interface GroupReport {
  readonly isGood: boolean;
  readonly operations: number;
  readonly acknowledged: number;
  readonly unknown: number;
  readonly faults: number;
  readonly findings: readonly Finding[];
  readonly undecided: number;
  /** From the kill until the group had a new primary, and until the service acknowledged a change again. */
  readonly failovers: readonly { primarySeconds: number; serviceSeconds: number }[];
}

const CLIENTS = 6;
const BEFORE_KILL_MS = 8_000;
const AFTER_RETURN_MS = 6_000;
const PATIENCE_MS = 120_000;
const ROUTER_INTERVAL_MS = 100;

export async function runGroup(
  seed: number,
  progress: (line: string) => void,
  { kills = 1 } = {},
): Promise<GroupReport> {
  const random = new Random(seed);
  const group = await startReplicationGroup({ progress });
  try {
    let primary = await group.primary();
    const stage = await buildStage({ databaseUrl: () => primary.url() });
    const workload = new Workload(stage, random.fork());
    let isOver = false;
    const router = (async () => {
      // What an operator's proxy does: all connections lead to the primary of the moment.
      while (!isOver) {
        await sleep(ROUTER_INTERVAL_MS);
        if (primary.pid !== undefined) continue;
        primary = await group.primary();
        stage.proxy.target = { host: '127.0.0.1', port: primary.port };
        stage.proxy.cut();
      }
    })();
    try {
      await workload.prepare();
      const nemesis = new Nemesis(stage, random.fork(), {
        database: undefined,
        weights: { 'server frozen': 0, 'connections stalled': 1 },
        pauseMs: 1500,
      });
      const working = workload.run(CLIENTS, () => isOver);
      const harming = nemesis.run(() => isOver);
      const failovers: { primarySeconds: number; serviceSeconds: number }[] = [];
      for (let kill = 1; kill <= kills; kill++) {
        await sleep(BEFORE_KILL_MS);
        failovers.push(await failOver(primary, workload, () => primary, progress));
        await sleep(AFTER_RETURN_MS);
        const dead = group.nodes.find(({ pid }) => pid === undefined);
        if (dead && kill < kills) await group.restart(dead);
      }
      isOver = true;
      await Promise.all([working, harming, router]);
      stage.proxy.decide = undefined;
      await Promise.all(stage.servers.map((server) => server.end('SIGTERM')));
      stage.proxy.cut();
      await stage.waitForCalm();
      await Promise.all(stage.servers.map((server) => server.start()));
      const db = await stage.connect();
      const { findings, undecided } = await workload.check(db);
      db.destroy();
      const acknowledged = [...workload.tally.operations]
        .filter(([what]) => /change.* ok$|new password ok$/.test(what) && !what.includes('validate'))
        .reduce((sum, [, times]) => sum + times, 0);
      return {
        isGood: findings.length === 0 && undecided === 0,
        operations: workload.tally.total,
        acknowledged,
        unknown: workload.tally.unknown,
        faults: nemesis.total + kills,
        findings,
        undecided,
        failovers,
      };
    } finally {
      isOver = true;
      await router.catch(() => {});
      workload.dispose();
      await stage.dispose();
    }
  } finally {
    await group.dispose();
  }
}

async function failOver(
  old: PrivateDatabase,
  workload: Workload,
  current: () => PrivateDatabase,
  progress: (line: string) => void,
): Promise<{ primarySeconds: number; serviceSeconds: number }> {
  progress(`${workload.tally.total} operations; killing the primary on port ${old.port}`);
  await old.kill();
  const start = performance.now();
  let primarySeconds = Number.NaN;
  for (;;) {
    await sleep(20);
    const seconds = (performance.now() - start) / 1000;
    if (Number.isNaN(primarySeconds) && current() !== old) primarySeconds = seconds;
    // Until then replies to what was committed before the kill may come, held up in a stalled connection.
    if (workload.lastAcknowledged > start + primarySeconds * 1000) {
      const serviceSeconds = (workload.lastAcknowledged - start) / 1000;
      progress(
        `a new primary after ${primarySeconds.toFixed(1)} s, changes acknowledged again after ${serviceSeconds.toFixed(1)} s`,
      );
      return { primarySeconds, serviceSeconds };
    }
    if (seconds * 1000 > PATIENCE_MS)
      throw new Error('the service did not come back after the primary was killed');
  }
}

export function formatGroup(report: GroupReport): string {
  return [
    `group: ${report.operations} operations, ${report.acknowledged} acknowledged changes, ${report.faults} faults, ${report.unknown} unknown`,
    ...report.failovers.map(
      ({ primarySeconds, serviceSeconds }) =>
        `  primary killed: a new one after ${primarySeconds.toFixed(1)} s, service back after ${serviceSeconds.toFixed(1)} s`,
    ),
    `  violations: ${report.findings.length}, undecided users: ${report.undecided}`,
    ...report.findings
      .slice(0, 10)
      .flatMap(({ userId, what, evidence }) => [
        `  user ${userId}: ${what}`,
        ...evidence.map((line) => `    ${line}`),
      ]),
  ].join('\n');
}
