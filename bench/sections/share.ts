/** How much of what hashing alone allows becomes finished changes, and what better-auth makes of it. */
import type { ServerProcess } from '../../test/support/service.ts';
import { total } from '../processes.ts';
import type { Findings, Verdict } from '../report.ts';
import type { Scale } from '../scale.ts';
import {
  type Filled,
  type LoadClient,
  latency,
  type Measured,
  measure,
  type Peer,
  rekeyTarget,
  type Stage,
} from '../stage.ts';
import { figure, spread, sum, withSpread } from '../statistics.ts';

const WARM_UP_SECONDS = 0.5;
const DEADLINE_MS = 15_000;
const SHARE_TARGET = 0.9;
const EFFICIENCY_TARGET = 0.93;
const PEER_TARGET = 1.5;
const JUDGED_CALLERS = [8, 32];

interface Sample {
  readonly perSecond: number;
  readonly share: number;
  readonly efficiency: number;
  readonly p50: number;
  readonly p99: number;
  /** Of the machine's CPU time, the share of programs that are no part of this. */
  readonly strangers: number;
  /** CPU milliseconds a change. */
  readonly cpu: {
    readonly pool: number;
    readonly main: number;
    readonly others: number;
    readonly database: number;
    readonly client: number;
  };
}

/** Where the time of one change went, by its log line, in milliseconds. */
interface Phases {
  readonly queue: number;
  readonly hash: number;
  readonly database: number;
  readonly rest: number;
}

export async function measureShare(
  stage: Stage,
  scale: Scale,
  { filled, server, client, peer }: { filled: Filled; server: ServerProcess; client: LoadClient; peer: Peer },
  progress: (line: string) => void,
): Promise<Findings> {
  const bounds: number[] = [];
  const rekey = new Map<number, Sample[]>(scale.callers.map((callers) => [callers, []]));
  const others = new Map<number, Sample[]>(scale.peerCallers.map((callers) => [callers, []]));
  const phases = new Map<number, Phases>();
  const databasePid = stage.database.pid as number;
  const load = (callers: number, target: ReturnType<typeof rekeyTarget>) => ({
    target,
    call: 'change' as const,
    people: [0, filled.population.users] as const,
    arrivals: { callers },
    warmUpSeconds: WARM_UP_SECONDS,
    seconds: scale.seconds,
    deadlineMs: DEADLINE_MS,
  });

  for (let round = 1; round <= scale.rounds; round++) {
    // The machine is not equally fast for long: each load is held against the bound just before and just after it.
    let before = await stage.boundPerSecond(scale.seconds / 2);
    const betweenBounds = async (target: ReturnType<typeof rekeyTarget>, pid: number, callers: number) => {
      const measured = await measure(client, load(callers, target), [pid, databasePid]);
      const after = await stage.boundPerSecond(scale.seconds / 2);
      const bound = (before + after) / 2;
      before = after;
      bounds.push(bound);
      return sampleOf(measured, bound);
    };
    for (const callers of scale.callers) {
      const lineCount = server.lines.length;
      rekey.get(callers)?.push(await betweenBounds(rekeyTarget(filled, server), server.pid, callers));
      phases.set(callers, phasesOf(server.lines.slice(lineCount)));
      if (others.has(callers)) others.get(callers)?.push(await betweenBounds(peer.target, peer.pid, callers));
    }
    progress(
      `share of the bound: round ${round} of ${scale.rounds}, the bound is ${figure(before)} changes/s`,
    );
  }
  return present({ bounds, rekey, others, phases });
}

function sampleOf(measured: Measured, bound: number): Sample {
  const [server, database] = measured.cpu as [Measured['cpu'][0], Measured['cpu'][0]];
  const each = (ms: number) => ms / measured.done;
  return {
    perSecond: measured.perSecond,
    share: measured.perSecond / bound,
    efficiency: server.pool / total(server),
    strangers: 1 - (total(server) + total(database) + measured.report.cpuMs) / measured.machineMs,
    p50: latency(measured, 'OK', 0.5),
    p99: latency(measured, 'OK', 0.99),
    cpu: {
      pool: each(server.pool),
      main: each(server.main),
      others: each(server.others),
      database: each(total(database)),
      client: each(measured.report.cpuMs),
    },
  };
}

function phasesOf(lines: readonly string[]): Phases {
  const calls = lines
    .map((line) => JSON.parse(line))
    .filter(({ msg, code }) => msg === 'call' && code === 'OK') as Record<string, number>[];
  const mean = (key: string) => sum(calls.map((call) => call[key] ?? 0)) / calls.length;
  const [queue, hash, database] = [mean('queueMs'), mean('hashMs'), mean('databaseMs')];
  return { queue, hash, database, rest: mean('ms') - queue - hash - database };
}

const over = (samples: readonly Sample[], pick: (sample: Sample) => number) => spread(samples.map(pick));

function present({
  bounds,
  rekey,
  others,
  phases,
}: {
  bounds: readonly number[];
  rekey: ReadonlyMap<number, Sample[]>;
  others: ReadonlyMap<number, Sample[]>;
  phases: ReadonlyMap<number, Phases>;
}): Findings {
  const verdicts: Verdict[] = [];
  for (const [callers, samples] of rekey) {
    if (!JUDGED_CALLERS.includes(callers)) continue;
    const share = over(samples, ({ share }) => share);
    const efficiency = over(samples, ({ efficiency }) => efficiency);
    verdicts.push(
      {
        what: `share of the Argon2 bound, ${callers} callers`,
        target: `≥ ${SHARE_TARGET}`,
        measured: withSpread(share),
        isMet: share.median >= SHARE_TARGET,
      },
      {
        what: `server's efficiency, ${callers} callers`,
        target: `≥ ${EFFICIENCY_TARGET}`,
        measured: withSpread(efficiency),
        isMet: efficiency.median >= EFFICIENCY_TARGET,
      },
    );
  }
  const ratios = new Map(
    [...others].map(([callers, samples]) => [
      callers,
      spread(
        samples.map(({ perSecond }, round) => (rekey.get(callers)?.[round]?.perSecond ?? 0) / perSecond),
      ),
    ]),
  );
  for (const [callers, ratio] of ratios) {
    verdicts.push({
      what: `changes/s beside better-auth's, ${callers} callers`,
      target: `≥ ${PEER_TARGET}`,
      measured: withSpread(ratio),
      isMet: ratio.median >= PEER_TARGET,
    });
  }

  const row = (name: string, samples: readonly Sample[]) => [
    name,
    withSpread(over(samples, ({ perSecond }) => perSecond)),
    withSpread(over(samples, ({ share }) => share)),
    withSpread(over(samples, ({ efficiency }) => efficiency)),
    figure(over(samples, ({ p50 }) => p50).median),
    figure(over(samples, ({ p99 }) => p99).median),
    figure(100 * over(samples, ({ strangers }) => strangers).median),
  ];
  const cpuRow = (name: string, samples: readonly Sample[]) => [
    name,
    ...(['pool', 'main', 'others', 'database', 'client'] as const).map((part) =>
      withSpread(over(samples, ({ cpu }) => cpu[part])),
    ),
  ];
  const named = [
    ...[...rekey].map(([callers, samples]) => [`Rekey, ${callers} callers`, samples] as const),
    ...[...others].map(([callers, samples]) => [`better-auth, ${callers} callers`, samples] as const),
  ];
  const bound = spread(bounds);
  return {
    verdicts,
    tables: [
      {
        title: 'Share of the Argon2 bound',
        note: `The bound: ${withSpread(bound)} changes/s, two hashes each, measured by itself just before and just after each load. The last column is the share of the CPU time that programs took which are no part of the benchmark: figures of a row with more than a few per cent there are too low.`,
        headings: [
          'closed loop',
          'changes/s',
          'share of the bound',
          'efficiency',
          'p50 ms',
          'p99 ms',
          'others’ CPU %',
        ],
        rows: named.map(([name, samples]) => row(name, samples)),
      },
      {
        title: 'CPU a change, milliseconds',
        note: 'Server: libuv pool (Argon2), main thread, other threads; the database server; the load client.',
        headings: ['closed loop', 'pool', 'main thread', 'other threads', 'database', 'client'],
        rows: named.map(([name, samples]) => cpuRow(name, samples)),
      },
      {
        title: "Where a call's time goes, milliseconds, means",
        headings: ['callers', 'waiting for a slot', 'hashing', 'database', 'the rest'],
        rows: [...phases].map(([callers, { queue, hash, database, rest }]) => [
          String(callers),
          ...[queue, hash, database, rest].map(figure),
        ]),
      },
    ],
    plots: [
      {
        kind: 'lines',
        title: 'Throughput against the bound',
        x: 'callers, each waiting for its answer',
        y: 'changes a second',
        isLogX: true,
        series: [
          {
            name: 'Rekey',
            points: [...rekey].map(([callers, samples]) => [
              callers,
              over(samples, (s) => s.perSecond).median,
            ]),
          },
          {
            name: 'better-auth',
            points: [...others].map(([callers, samples]) => [
              callers,
              over(samples, (s) => s.perSecond).median,
            ]),
          },
          {
            name: 'Argon2 bound',
            points: [...rekey.keys()].map((callers) => [callers, bound.median]),
            isDashed: true,
          },
        ],
      },
      {
        kind: 'bars',
        title: "Where a call's time goes",
        x: 'milliseconds',
        parts: ['waiting for a slot', 'hashing', 'database', 'the rest'],
        bars: [...phases].map(([callers, { queue, hash, database, rest }]) => ({
          name: `${callers} callers`,
          values: [queue, hash, database, Math.max(0, rest)],
        })),
      },
      {
        kind: 'bars',
        title: 'What a change costs in CPU',
        x: 'milliseconds of CPU',
        parts: ['Argon2', 'main thread', 'other threads', 'database server', 'load client'],
        bars: named.map(([name, samples]) => ({
          name: name.replace(' callers', '').replace('better-auth', 'peer'),
          values: (['pool', 'main', 'others', 'database', 'client'] as const).map(
            (part) => over(samples, ({ cpu }) => cpu[part]).median,
          ),
        })),
      },
    ],
  };
}
