/** One server process against two on the same machine. */
import type { Findings } from '../report.ts';
import type { Scale } from '../scale.ts';
import { type Filled, type LoadClient, latency, measure, rekeyTarget, type Stage } from '../stage.ts';
import { figure, spread, withSpread } from '../statistics.ts';

const CALLERS = 32;
const DEADLINE_MS = 15_000;

export async function measureScaleOut(
  stage: Stage,
  scale: Scale,
  { filled, client }: { filled: Filled; client: LoadClient },
  progress: (line: string) => void,
): Promise<Findings> {
  const { cores } = stage.options;
  const share = Math.max(1, Math.floor(cores / 2));
  const halved = { UV_THREADPOOL_SIZE: String(share), REKEY_HASH_SLOTS: String(share + 1) };
  const start = (count: number, environment: Record<string, string> = {}) =>
    Promise.all(Array.from({ length: count }, () => stage.startRekey(filled, environment)));
  const variants = [
    { name: 'one process', servers: await start(1) },
    { name: 'two, each as if alone', servers: await start(2) },
    { name: 'two, each with half the threads', servers: await start(2, halved) },
  ].map((variant) => ({
    ...variant,
    changes: [] as number[],
    p99: [] as number[],
    refusals: [] as number[],
  }));

  for (let round = 1; round <= scale.rounds; round++) {
    for (const { servers, changes, p99, refusals } of variants) {
      const load = {
        target: rekeyTarget(filled, ...servers),
        people: [0, filled.population.users] as const,
        arrivals: { callers: CALLERS },
        warmUpSeconds: 0.5,
        seconds: scale.seconds / 2,
        deadlineMs: DEADLINE_MS,
      };
      const hashing = await measure(client, { ...load, call: 'change' });
      changes.push(hashing.perSecond);
      p99.push(latency(hashing, 'OK', 0.99));
      const { report } = await measure(client, { ...load, call: 'bad-token' });
      refusals.push((report.latencies.UNAUTHENTICATED?.length ?? 0) / report.seconds);
    }
    progress(`one process against two: round ${round} of ${scale.rounds}`);
  }
  await Promise.all(variants.flatMap(({ servers }) => servers.map((server) => server.stop())));

  const one = variants[0] as (typeof variants)[0];
  const ratio = (values: readonly number[], base: readonly number[]) =>
    withSpread(spread(values.map((value, round) => value / (base[round] as number))));
  return {
    verdicts: [],
    tables: [
      {
        title: `One server process against two on ${cores} cores, ${CALLERS} callers`,
        note: 'The load client and the database share these cores.',
        headings: ['servers', 'changes/s', 'of one', 'p99 ms', 'bad tokens/s', 'of one'],
        rows: variants.map(({ name, changes, p99, refusals }) => [
          name,
          figure(spread(changes).median),
          ratio(changes, one.changes),
          figure(spread(p99).median),
          figure(spread(refusals).median),
          ratio(refusals, one.refusals),
        ]),
      },
    ],
    plots: [],
  };
}
