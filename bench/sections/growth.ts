/** Whether a call costs more when there are a thousand times as many users, sessions and audit records. */
import { total } from '../processes.ts';
import type { Findings } from '../report.ts';
import type { Scale } from '../scale.ts';
import { type Filled, type LoadClient, latency, measure, rekeyTarget, type Stage } from '../stage.ts';
import { figure, spread, withSpread } from '../statistics.ts';

const CALLERS = 8;
const DEADLINE_MS = 15_000;
const COST_TARGET = 1.1;

interface Sample {
  readonly perSecond: number;
  readonly main: number;
  readonly database: number;
  readonly p50: number;
  readonly refusalP50: number;
}

export async function measureGrowth(
  stage: Stage,
  scale: Scale,
  { small, large, client }: { small: Filled; large: Filled; client: LoadClient },
  progress: (line: string) => void,
): Promise<Findings> {
  const sides = [];
  for (const filled of [small, large]) {
    sides.push({ filled, server: await stage.startRekey(filled), samples: [] as Sample[] });
  }
  const databasePid = stage.database.pid as number;
  for (let round = 0; round <= scale.rounds; round++) {
    for (const { filled, server, samples } of round % 2 === 0 ? sides : sides.toReversed()) {
      const load = {
        target: rekeyTarget(filled, server),
        people: [0, filled.population.users] as const,
        warmUpSeconds: 0.5,
        seconds: scale.seconds,
        deadlineMs: DEADLINE_MS,
      };
      const changes = await measure(client, { ...load, call: 'change', arrivals: { callers: CALLERS } }, [
        server.pid,
        databasePid,
      ]);
      const refusals = await measure(client, {
        ...load,
        call: 'bad-token',
        arrivals: { callers: 1 },
        seconds: scale.seconds / 4,
      });
      // The first round warms the database's cache.
      if (round === 0) continue;
      const [main = Number.NaN, database = Number.NaN] = changes.cpu.map(
        (cpu, index) => (index === 0 ? cpu.main + cpu.others : total(cpu)) / changes.done,
      );
      const p50 = latency(changes, 'OK', 0.5);
      const refusalP50 = latency(refusals, 'UNAUTHENTICATED', 0.5);
      samples.push({ perSecond: changes.perSecond, main, database, p50, refusalP50 });
    }
    if (round > 0) progress(`growth: round ${round} of ${scale.rounds}`);
  }
  for (const { server } of sides) await server.stop();

  const [less, more] = sides.map(({ samples }) => samples) as [Sample[], Sample[]];
  const ratio = (pick: (sample: Sample) => number) =>
    spread(more.map((sample, round) => pick(sample) / pick(less[round] as Sample)));
  const cost = ratio(({ main, database }) => main + database);
  const describe = ({ population: { users, sessionsEach } }: Filled) =>
    `${users.toLocaleString('en')} users, ${(users * sessionsEach).toLocaleString('en')} sessions and audit records`;
  const row = (name: string, pick: (sample: Sample) => number) => [
    name,
    figure(spread(less.map(pick)).median),
    figure(spread(more.map(pick)).median),
    withSpread(ratio(pick)),
  ];
  return {
    verdicts: [
      {
        what: `cost of a change with ${large.population.users.toLocaleString('en')} users against ${small.population.users.toLocaleString('en')}`,
        target: `≤ ${COST_TARGET}`,
        measured: withSpread(cost),
        isMet: cost.median <= COST_TARGET,
      },
    ],
    tables: [
      {
        title: 'Growth',
        note: `Small: ${describe(small)}. Large: ${describe(large)}. ${CALLERS} callers, rounds interleaved.`,
        headings: ['a change', 'small', 'large', 'ratio'],
        rows: [
          row('CPU without hashing: server, database; ms', ({ main, database }) => main + database),
          row('of it the database server, ms', ({ database }) => database),
          row('changes/s', ({ perSecond }) => perSecond),
          row('p50, ms', ({ p50 }) => p50),
          row('a bad token refused, p50 ms', ({ refusalP50 }) => refusalP50),
        ],
      },
    ],
    plots: [],
  };
}
