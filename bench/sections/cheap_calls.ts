/** How quick the calls are that need no hashing, while 32 callers hash. */
import type { ServerProcess } from '../../test/support/service.ts';
import type { CallKind } from '../load_client.ts';
import type { Findings } from '../report.ts';
import type { Scale } from '../scale.ts';
import { type Filled, type LoadClient, latency, type Measured, measure, rekeyTarget } from '../stage.ts';
import { figure, quantile, spread, withSpread } from '../statistics.ts';

const CALLERS = 32;
const PROBES_PER_SECOND = 50;
const DEADLINE_MS = 15_000;
const P99_TARGET_MS = 15;
const P99 = 0.99;
const ascending = (a: number, b: number) => a - b;

interface Probe {
  readonly call: CallKind;
  readonly name: string;
  readonly outcome: string;
  /** Of the server's log lines; empty: it writes none. */
  readonly reason: string;
}

const PROBES: readonly Probe[] = [
  { call: 'health', name: 'health check', outcome: 'OK', reason: '' },
  {
    call: 'bad-token',
    name: 'bad token',
    outcome: 'UNAUTHENTICATED',
    reason: 'SESSION_INVALID',
  },
  // Beside the policy's work it waits for the disk: it is audited before it is answered.
  {
    call: 'weak-password',
    name: 'policy refusal',
    outcome: 'INVALID_ARGUMENT',
    reason: 'PASSWORD_POLICY',
  },
];

export async function measureCheapCalls(
  scale: Scale,
  {
    filled,
    server,
    client,
    prober,
  }: { filled: Filled; server: ServerProcess; client: LoadClient; prober: LoadClient },
  progress: (line: string) => void,
): Promise<Findings> {
  const target = rekeyTarget(filled, server);
  const half = filled.population.users / 2;
  const common = { target, warmUpSeconds: 0.5, seconds: scale.seconds, deadlineMs: DEADLINE_MS };
  const probe = (call: CallKind) =>
    measure(prober, {
      ...common,
      call,
      people: [half, filled.population.users],
      arrivals: { perSecond: PROBES_PER_SECOND },
    });
  const idle = new Map<CallKind, Measured[]>(PROBES.map(({ call }) => [call, []]));
  const busy = new Map<CallKind, Measured[]>(PROBES.map(({ call }) => [call, []]));
  const logged = new Map<CallKind, number[]>(PROBES.map(({ call }) => [call, []]));
  for (let round = 1; round <= scale.overloadRounds; round++) {
    for (const { call, reason } of PROBES) {
      idle.get(call)?.push(await probe(call));
      const hashing = client.ask({
        ...common,
        call: 'change',
        people: [0, half],
        arrivals: { callers: CALLERS },
        seconds: scale.seconds + 0.5,
      });
      const lineCount = server.lines.length;
      busy.get(call)?.push(await probe(call));
      await hashing;
      const ofProbe = server.lines.slice(lineCount).filter((line) => line.includes(`"reason":"${reason}"`));
      logged.get(call)?.push(quantile(ofProbe.map((line) => JSON.parse(line).ms).sort(ascending), P99));
    }
    progress(`cheap calls under saturation: round ${round} of ${scale.overloadRounds}`);
  }

  const over = (all: readonly Measured[] | undefined, outcome: string, q: number) =>
    spread((all ?? []).map((measured) => latency(measured, outcome, q)));
  return {
    verdicts: PROBES.map(({ call, name, outcome }) => {
      const p99 = over(busy.get(call), outcome, P99);
      return {
        what: `${name} while ${CALLERS} callers hash, p99 ms`,
        target: `≤ ${P99_TARGET_MS}`,
        measured: withSpread(p99),
        isMet: p99.median <= P99_TARGET_MS,
      };
    }),
    tables: [
      {
        title: `Cheap calls, milliseconds, ${PROBES_PER_SECOND} a second by the clock`,
        note: 'Seen by a client that shares the two cores with the server, its database and the client that hashes; the last column is what the server says of the same calls.',
        headings: [
          'call',
          'idle p50',
          'idle p99',
          'saturated p50',
          'saturated p99',
          'p99 by the server’s log',
        ],
        rows: PROBES.map(({ call, name, outcome }) => [
          name,
          figure(over(idle.get(call), outcome, 0.5).median),
          figure(over(idle.get(call), outcome, P99).median),
          figure(over(busy.get(call), outcome, 0.5).median),
          withSpread(over(busy.get(call), outcome, P99)),
          figure(spread(logged.get(call) ?? []).median),
        ]),
      },
    ],
    plots: [],
  };
}
