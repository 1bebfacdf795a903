/** Does harm, seeded: to processes, connections, single commands, rows and clocks, and always puts things right again. */
import { setTimeout as sleep } from 'node:timers/promises';
import type { RowDataPacket } from 'mysql2/promise';
import type { Command, Fate } from '../support/mysql_wire.ts';
import type { PrivateDatabase } from '../support/private_database.ts';
import type { Random } from './random.ts';
import { restartUntilItRuns, type Stage } from './stage.ts';

export const FAULTS = {
  /** At a COMMIT: before, during, after, and late. */
  'cut around COMMIT': 34,
  'cut at a statement of a transaction': 16,
  'cut at a single statement': 6,
  'command swallowed': 3,
  'connections cut': 4,
  'connections stalled': 4,
  'connections killed by their IDs': 6,
  'rows locked': 6,
  deadlock: 8,
  'server killed': 3,
  'server frozen': 3,
  'database killed': 2,
  'database restarted': 1,
  'clock shifted': 4,
} as const;
export type FaultName = keyof typeof FAULTS;

/** Statements of the longest transaction, COMMIT not among them: authority, password, sessions, key, audit. */
const STATEMENTS_MAX = 6;
const ARMED_MAX_MS = 3_000;
const CLOCK_SHIFTS_S = [3600, -3600, 86_400, 0, 0];

export interface NemesisOptions {
  /** The database to kill; absent: it is left alone. */
  database: PrivateDatabase | undefined;
  weights?: Partial<Record<FaultName, number>>;
  /** Milliseconds between two faults, at most. */
  pauseMs?: number;
  onFault?: (line: string) => void;
}

interface Armed {
  readonly name: FaultName;
  readonly matches: (command: Command) => boolean;
  readonly fate: Fate;
  left: number;
}

export class Nemesis {
  /** How often each fault was really done. */
  readonly done = new Map<string, number>();
  readonly #stage: Stage;
  readonly #random: Random;
  readonly #database: PrivateDatabase | undefined;
  readonly #weights: Record<FaultName, number>;
  readonly #pauseMs: number;
  readonly #onFault: (line: string) => void;
  #armed: Armed[] = [];

  constructor(
    stage: Stage,
    random: Random,
    { database, weights, pauseMs = 900, onFault = () => {} }: NemesisOptions,
  ) {
    this.#stage = stage;
    this.#random = random;
    this.#database = database;
    this.#pauseMs = pauseMs;
    this.#onFault = onFault;
    this.#weights = { ...FAULTS, ...weights };
    if (!database) Object.assign(this.#weights, { 'database killed': 0, 'database restarted': 0 });
    if (!stage.clock) this.#weights['clock shifted'] = 0;
    stage.proxy.decide = (command) => this.#decide(command);
  }

  get total(): number {
    return [...this.done.values()].reduce((sum, times) => sum + times, 0);
  }

  /** Does harm until told to stop; leaves everything running. */
  async run(isEnough: () => boolean): Promise<void> {
    while (!isEnough()) {
      await sleep(this.#random.between(this.#pauseMs / 4, this.#pauseMs));
      if (isEnough()) break;
      await this.#strike(this.#random.weighted(this.#weights));
    }
    this.#armed = [];
    this.#stage.proxy.resume();
    await this.#stage.clock?.shift(0);
  }

  #count(name: FaultName, what = ''): void {
    const key = what === '' ? name : `${name}: ${what}`;
    this.done.set(key, (this.done.get(key) ?? 0) + 1);
    this.#onFault(key);
  }

  #decide(command: Command): Fate {
    const armed = this.#armed.find(({ left, matches }) => left > 0 && matches(command));
    if (!armed) return 'pass';
    armed.left--;
    this.#count(armed.name, armed.fate);
    return armed.fate;
  }

  async #arm(
    name: FaultName,
    fate: Fate,
    times: number,
    matches: (command: Command) => boolean,
  ): Promise<void> {
    const armed: Armed = { name, fate, left: times, matches };
    this.#armed.push(armed);
    const deadline = performance.now() + ARMED_MAX_MS;
    while (armed.left > 0 && performance.now() < deadline) await sleep(10);
    this.#armed = this.#armed.filter((other) => other !== armed);
  }

  async #strike(name: FaultName): Promise<void> {
    const random = this.#random;
    const { proxy, servers, clock } = this.#stage;
    switch (name) {
      case 'cut around COMMIT': {
        const fate = random.pick(['cut-before', 'cut-during', 'cut-after', 'cut-after', 'late'] as const);
        return await this.#arm(name, fate, random.between(1, 4), ({ isCommit }) => isCommit);
      }
      case 'cut at a statement of a transaction': {
        const place = random.between(1, STATEMENTS_MAX);
        const fate = random.pick(['cut-before', 'cut-during', 'cut-after'] as const);
        return await this.#arm(
          name,
          fate,
          random.between(1, 3),
          (command) => command.isTransactional && !command.isCommit && command.place === place,
        );
      }
      case 'cut at a single statement': {
        const fate = random.pick(['cut-before', 'cut-during', 'cut-after'] as const);
        return await this.#arm(name, fate, random.between(1, 3), (command) => !command.isTransactional);
      }
      case 'command swallowed':
        return await this.#arm(name, 'swallow', 1, () => true);
      case 'connections cut':
        if (proxy.cut(() => random.chance(0.5)) > 0) this.#count(name);
        return;
      case 'connections stalled': {
        proxy.stall();
        this.#count(name);
        // Some longer and some shorter than what a statement may take.
        await sleep(random.between(50, 2500));
        if (random.chance(0.3)) proxy.cut();
        return proxy.resume();
      }
      case 'connections killed by their IDs':
        return await this.#withDatabase(async (db) => {
          const [rows] = await db.query<RowDataPacket[]>(
            'SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND id <> CONNECTION_ID()',
          );
          for (const { id } of rows.filter(() => random.chance(0.4))) {
            await db
              .query(`KILL ${random.chance(0.7) ? 'CONNECTION' : 'QUERY'} ${Number(id)}`)
              .catch(() => {});
          }
          if (rows.length > 0) this.#count(name);
        });
      case 'rows locked':
        return await this.#withDatabase(async (db) => {
          await db.query('START TRANSACTION');
          await db.query('SELECT user_id FROM users ORDER BY created_at DESC LIMIT 12 FOR UPDATE');
          this.#count(name);
          // Some longer and some shorter than what a statement waits for a lock.
          await sleep(random.between(30, 1600));
          await db.query('ROLLBACK');
        });
      case 'deadlock':
        return await this.#withDatabase(async (db) => {
          // The database gives up whoever changed less: with many rows changed here, that is the server.
          await db.query('START TRANSACTION');
          if (random.chance(0.8)) {
            const rows = Array.from({ length: 60 }, () => "('nothing', '')").join(', ');
            await db.query(`INSERT INTO fault_ledger (kind, subject) VALUES ${rows}`);
          }
          await db.query('SELECT user_id FROM users ORDER BY created_at DESC LIMIT 8 FOR UPDATE');
          await sleep(random.between(10, 60));
          await db.query(
            'SELECT s.session_id FROM (SELECT user_id FROM users ORDER BY created_at DESC LIMIT 8) u JOIN sessions s ON s.user_id = u.user_id WHERE s.ended_at IS NULL FOR UPDATE',
          );
          this.#count(name);
          await db.query('ROLLBACK');
        });
      case 'server killed': {
        const server = random.pick(servers);
        await server.end('SIGKILL');
        this.#count(name);
        await sleep(random.between(0, 300));
        return await server.start();
      }
      case 'server frozen': {
        const server = random.pick(servers);
        server.signal('SIGSTOP');
        this.#count(name);
        await sleep(random.between(50, 1800));
        return server.signal('SIGCONT');
      }
      case 'database killed':
      case 'database restarted': {
        const database = this.#database as PrivateDatabase;
        await (name === 'database killed' ? database.kill() : database.stop());
        this.#count(name);
        await sleep(random.between(0, 500));
        return await restartUntilItRuns(database);
      }
      case 'clock shifted':
        await clock?.shift(random.pick(CLOCK_SHIFTS_S));
        return this.#count(name);
    }
  }

  /** What the harm itself meets on the way is no finding: the database may be struck at the same time. */
  async #withDatabase(work: (db: Awaited<ReturnType<Stage['connect']>>) => Promise<void>): Promise<void> {
    try {
      const db = await this.#stage.connect();
      try {
        await work(db);
      } finally {
        db.destroy();
      }
    } catch {
      await sleep(100);
    }
  }
}
