/** What happens when more is asked for than can be hashed: arrivals by the clock, from half to ten times the capacity. */
import type { ServerProcess } from '../../test/support/service.ts';
import { peakResidentMb, total, untilIdle } from '../processes.ts';
import type { Findings } from '../report.ts';
import type { Scale } from '../scale.ts';
import {
  type Filled,
  type LoadClient,
  latency,
  type Measured,
  measure,
  type Peer,
  rekeyTarget,
} from '../stage.ts';
import { figure, spread, sum, withSpread } from '../statistics.ts';

/** What a caller would wait for: long enough for a change, short enough for a person. */
const DEADLINE_MS = 2_000;
const CAPACITY_CALLERS = 32;
const GOODPUT_TARGET = 0.95;
const REFUSAL_TARGET_MS = 50;
const RESIDENT_TARGET_MB = 200;

interface Sample {
  readonly goodput: number;
  readonly refused: number;
  readonly failed: number;
  readonly p50: number;
  readonly p99: number;
  readonly refusalP50: number;
  readonly refusalP99: number;
  readonly residentMb: number;
  /** Of the machine's CPU time, per cent. */
  readonly argon2: number;
  readonly restOfServer: number;
  readonly client: number;
}

const COLUMNS = [
  'refused',
  'failed',
  'p50',
  'p99',
  'refusalP50',
  'refusalP99',
  'residentMb',
  'argon2',
  'restOfServer',
  'client',
] as const satisfies (keyof Sample)[];

export async function measureOverload(
  scale: Scale,
  { filled, server, client, peer }: { filled: Filled; server: ServerProcess; client: LoadClient; peer: Peer },
  progress: (line: string) => void,
): Promise<Findings> {
  const load = (target: ReturnType<typeof rekeyTarget>) => ({
    target,
    call: 'change' as const,
    people: [0, filled.population.users] as const,
    // By then the queue is as long as it gets.
    warmUpSeconds: DEADLINE_MS / 1000,
    seconds: scale.seconds,
    deadlineMs: DEADLINE_MS,
  });
  const rekey = new Map<number, Sample[]>(scale.offered.map((factor) => [factor, []]));
  const others = new Map<number, Sample[]>(scale.offeredToPeer.map((factor) => [factor, []]));
  const capacities: number[] = [];
  for (let round = 1; round <= scale.overloadRounds; round++) {
    const target = rekeyTarget(filled, server);
    const closed = { ...load(target), arrivals: { callers: CAPACITY_CALLERS } };
    const capacity = (await measure(client, closed)).perSecond;
    capacities.push(capacity);
    for (const factor of scale.offered) {
      const open = { ...load(target), arrivals: { perSecond: factor * capacity } };
      const [measured, residentMb] = await peakResidentMb(server.pid, () =>
        measure(client, open, [server.pid]),
      );
      rekey.get(factor)?.push(sampleOf(measured, residentMb));
      if (others.has(factor)) {
        const beside = { ...open, target: peer.target };
        const [besides, besidesMb] = await peakResidentMb(peer.pid, () =>
          measure(client, beside, [peer.pid]),
        );
        others.get(factor)?.push(sampleOf(besides, besidesMb));
        // It goes on hashing for callers that have gone, for longer than the load lasted.
        await untilIdle(peer.pid);
      }
      progress(
        `offered load: round ${round} of ${scale.overloadRounds}, ${factor} times ${figure(capacity)} calls/s`,
      );
    }
  }
  return present(capacities, rekey, others);
}

function sampleOf(measured: Measured, residentMb: number): Sample {
  const { latencies, seconds } = measured.report;
  const count = (outcome: string) => latencies[outcome]?.length ?? 0;
  const all = sum(Object.values(latencies).map(({ length }) => length));
  const [server] = measured.cpu as [Measured['cpu'][0]];
  const share = (ms: number) => (100 * ms) / measured.machineMs;
  return {
    goodput: measured.perSecond,
    refused: count('RESOURCE_EXHAUSTED') / seconds,
    failed: (all - count('OK') - count('RESOURCE_EXHAUSTED')) / seconds,
    p50: latency(measured, 'OK', 0.5),
    p99: latency(measured, 'OK', 0.99),
    refusalP50: latency(measured, 'RESOURCE_EXHAUSTED', 0.5),
    refusalP99: latency(measured, 'RESOURCE_EXHAUSTED', 0.99),
    residentMb,
    argon2: share(server.pool),
    restOfServer: share(total(server) - server.pool),
    client: share(measured.report.cpuMs),
  };
}

function present(
  capacities: readonly number[],
  rekey: ReadonlyMap<number, Sample[]>,
  others: ReadonlyMap<number, Sample[]>,
): Findings {
  const over = (samples: readonly Sample[], pick: (sample: Sample) => number) => spread(samples.map(pick));
  const factors = [...rekey.keys()];
  const highest = Math.max(...factors);
  const atHighest = rekey.get(highest) ?? [];
  const ofPeak = spread(
    atHighest.map(
      ({ goodput }, round) =>
        goodput / Math.max(...[...rekey.values()].map((samples) => samples[round]?.goodput ?? 0)),
    ),
  );
  const refusal = over(atHighest, ({ refusalP99 }) => refusalP99);
  const resident = spread([...rekey.values()].flat().map(({ residentMb }) => residentMb));
  const row = (name: string, samples: readonly Sample[]) => [
    name,
    withSpread(over(samples, ({ goodput }) => goodput)),
    ...COLUMNS.map((key) => figure(over(samples, (sample) => sample[key]).median)),
  ];
  const line = (name: string, key: keyof Sample, from: ReadonlyMap<number, Sample[]> = rekey) => ({
    name,
    points: [...from].map(
      ([factor, samples]) => [factor, over(samples, (sample) => sample[key]).median] as const,
    ),
  });
  return {
    verdicts: [
      {
        what: `goodput at ${highest} times the capacity, share of its peak`,
        target: `≥ ${GOODPUT_TARGET}`,
        measured: withSpread(ofPeak),
        isMet: ofPeak.median >= GOODPUT_TARGET,
      },
      {
        what: `time to refuse at ${highest} times the capacity, p99 ms`,
        target: `≤ ${REFUSAL_TARGET_MS}`,
        measured: withSpread(refusal),
        isMet: refusal.median <= REFUSAL_TARGET_MS,
      },
      {
        what: 'memory under overload, MB',
        target: `≤ ${RESIDENT_TARGET_MB}`,
        measured: withSpread(resident),
        isMet: resident.max <= RESIDENT_TARGET_MB,
      },
    ],
    tables: [
      {
        title: 'Offered load',
        note: `Open loop, independent arrivals, ${DEADLINE_MS} ms deadline; capacity ${withSpread(spread(capacities))} changes/s (${CAPACITY_CALLERS} callers, closed loop). Client and database are on the same cores: what refusing costs the server, and asking the client, is lost to Argon2.`,
        headings: [
          'offered / capacity',
          'goodput/s',
          'refused/s',
          'failed/s',
          'p50 ms',
          'p99 ms',
          'refusal p50',
          'refusal p99',
          'RSS MB',
          'CPU %: Argon2',
          'rest of server',
          'load client',
        ],
        rows: [
          ...[...rekey].map(([factor, samples]) => row(`Rekey × ${factor}`, samples)),
          ...[...others].map(([factor, samples]) => row(`better-auth × ${factor}`, samples)),
        ],
      },
    ],
    plots: [
      {
        kind: 'lines',
        title: 'Latency against offered load',
        x: 'offered load / capacity',
        y: 'milliseconds',
        isLogX: true,
        isLogY: true,
        series: [
          line('accepted, p50', 'p50'),
          line('accepted, p99', 'p99'),
          line('refused, p50', 'refusalP50'),
          line('refused, p99', 'refusalP99'),
        ],
      },
      {
        kind: 'lines',
        title: 'Goodput against offered load',
        x: 'offered load / capacity',
        y: 'changes a second',
        isLogX: true,
        series: [
          line('Rekey', 'goodput'),
          line('better-auth', 'goodput', others),
          {
            name: 'capacity',
            points: factors.map((factor) => [factor, spread(capacities).median]),
            isDashed: true,
          },
        ],
      },
    ],
  };
}
