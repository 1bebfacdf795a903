/** What one change costs beside its hashes: statements, round trips, bytes. */

import type { Findings } from '../report.ts';
import type { Scale } from '../scale.ts';
import { type Filled, type LoadClient, measure, rekeyTarget, type Stage } from '../stage.ts';
import { countStatements } from '../statements.ts';
import { figure, sum } from '../statistics.ts';

const CALLERS = 4;
const DEADLINE_MS = 15_000;
const ROUND_TRIPS_TARGET = 5;

export async function measureCost(
  stage: Stage,
  scale: Scale,
  { filled, client }: { filled: Filled; client: LoadClient },
  progress: (line: string) => void,
): Promise<Findings> {
  const counter = await countStatements(filled.url);
  const server = await stage.startRekey({ ...filled, url: counter.url });
  const load = (seconds: number) => ({
    target: rekeyTarget(filled, server),
    call: 'change' as const,
    people: [0, filled.population.users] as const,
    arrivals: { callers: CALLERS },
    warmUpSeconds: 0,
    seconds,
    deadlineMs: DEADLINE_MS,
  });
  // Connections are made and statements prepared before anything is counted.
  await measure(client, load(1));
  const lineCount = server.lines.length;
  const before = await stage.counters();
  const { statements } = await counter.during(() => measure(client, load(scale.seconds)));
  const after = await stage.counters();
  const calls = server.lines.slice(lineCount).filter((line) => line.includes('"msg":"call"')).length;
  await server.stop();
  await counter.close();
  progress(`cost a call: counted ${calls} changes`);

  const each = (count: number) => count / calls;
  const increase = (name: string) => each((after[name] ?? Number.NaN) - (before[name] ?? Number.NaN));
  // Prepared once by each connection: no part of a call, though one or another may fall into the time of counting.
  const ofCalls = [...statements].filter(([name]) => !name.startsWith('PREPARE'));
  const roundTrips = each(sum(ofCalls.map(([, count]) => count)));
  return {
    verdicts: [
      {
        what: 'round trips of an own change, guard and audit included',
        target: `≤ ${ROUND_TRIPS_TARGET}`,
        measured: figure(roundTrips),
        isMet: roundTrips <= ROUND_TRIPS_TARGET + 0.05,
      },
    ],
    tables: [
      {
        title: 'Statements of an own change',
        note: 'Counted on the wire between the server and its database.',
        headings: ['statement', 'times a call'],
        rows: [
          ...ofCalls.map(([name, count]) => [name, figure(each(count))]),
          ['all: round trips', figure(roundTrips)],
        ],
      },
      {
        title: 'Bytes and flushes of an own change, by the database server’s counters',
        headings: ['counter', 'a call'],
        rows: [
          ['sent to the database, bytes', figure(increase('Bytes_received'))],
          ['received from it, bytes', figure(increase('Bytes_sent'))],
          ['redo log, bytes', figure(increase('Innodb_os_log_written'))],
          ['binary log, bytes', figure(increase('binlog'))],
          ['flushes of data and redo log', figure(increase('Innodb_data_fsyncs'))],
          ['look-ups in an index', figure(increase('Handler_read_key'))],
          ['rows updated', figure(increase('Handler_update'))],
        ],
      },
    ],
    plots: [],
  };
}
