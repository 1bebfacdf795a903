import { setTimeout as sleep } from 'node:timers/promises';
import mysql, {
  type ConnectionOptions,
  type Pool,
  type PoolConnection,
  type QueryError,
  type ResultSetHeader,
  type RowDataPacket,
} from 'mysql2';
import { Wait } from '../call.ts';
import type { Config } from '../config.ts';
import { Refusal } from '../password/errors.ts';
import { isReadOnly, kindOf, NoConnection, StatementTimeout, saysNotCommitted } from './errors.ts';

export type Parameter = string | number | boolean | Buffer | Date | null;

/** Runs SQL: each statement by itself, or all within one transaction, depending on where it came from. */
export interface Executor {
  rows<Row>(sql: string, parameters?: readonly Parameter[]): Promise<Row[]>;
  /** @returns how many rows matched, and the ID that AUTO_INCREMENT gave. */
  write(sql: string, parameters?: readonly Parameter[]): Promise<{ matched: number; insertId: number }>;
}

/** A transaction's work, and how to find out on another connection whether it was committed. */
export interface Transaction<T> {
  work(tx: Executor): Promise<T>;
  /**
   * Asked when COMMIT got no answer. Must first lock a row that the transaction had locked: once that lock is
   * ours, the old transaction has ended one way or the other.
   */
  wasCommitted(tx: Executor, result: T): Promise<boolean>;
}

/** Connections that have rested for longer are asked whether they are alive before they are used. */
const PROVE_ALIVE_AFTER_MS = 5_000;
const PING_TIMEOUT_MS = 1_000;
/** Whole transactions tried against conflicts (1213, 1205, 1020). */
const CONFLICT_TRIES = 4;
const RETRY_PAUSE_MS = 20;
const RETRY_PAUSE_MAX_MS = 500;
/** COMMIT is not left alone because the caller went away: the outcome is still wanted for log and audit. */
const RESOLVE_COMMIT_MS = 10_000;
const RETRY_AFTER_MS = 1_000;
const MYSQL_PORT = 3306;
const TCP_KEEPALIVE_MS = 10_000;
/** Callers that may stand in line for a connection; each of them is bounded by its own deadline as well. */
const WAITING_MAX = 10_000;

/**
 * The database, through two pools: one for single statements, and one for transactions whose connections never
 * commit by themselves. That saves each transaction the round trip of a BEGIN, and no statement of a transaction
 * can ever take effect alone. Isolation is READ COMMITTED: the guarantees come from row locks and conditional
 * writes, not from snapshots.
 */
export class Database {
  readonly #statements: ConnectionPool;
  readonly #transactions: ConnectionPool;

  constructor(config: Pick<Config, 'database' | 'databaseCa'>) {
    this.#statements = new ConnectionPool(config, true);
    this.#transactions = new ConnectionPool(config, false);
  }

  /**
   * Single statements, each committed by itself. A read whose connection is lost is repeated on another one
   * for as long as somebody waits; a write only where repeating it does no harm, which is what `repeat` says.
   */
  statements(wait: Wait): Executor & { writeRepeatably: Executor['write'] } {
    const run = async (sql: string, parameters: readonly Parameter[], repeat: boolean) =>
      await wait.timed('database', async () => {
        for (let attempt = 1; ; attempt++) {
          try {
            return await this.#statements.with(wait, (connection) =>
              connection.execute(sql, parameters, wait),
            );
          } catch (error) {
            if (
              error instanceof Refusal ||
              kindOf(error) === 'defect' ||
              (!repeat && kindOf(error) === 'lost')
            ) {
              throw asRefusal(error);
            }
            await pauseBeforeRetry(attempt, wait, error);
          }
        }
      });
    const write = async (sql: string, parameters: readonly Parameter[], repeat: boolean) => {
      const { affectedRows, insertId } = (await run(sql, parameters, repeat)) as ResultSetHeader;
      return { matched: affectedRows, insertId };
    };
    return {
      rows: async <Row>(sql: string, parameters: readonly Parameter[] = []) =>
        (await run(sql, parameters, true)) as Row[],
      write: (sql, parameters = []) => write(sql, parameters, false),
      writeRepeatably: (sql, parameters = []) => write(sql, parameters, true),
    };
  }

  /**
   * All of the work or none of it. Conflicts and lost connections begin it again; a COMMIT without an answer is
   * looked into on a new connection until the truth is known.
   * @throws Refusal UNAVAILABLE if the database is away, or the truth could not be learnt in time.
   */
  async transaction<T>(wait: Wait, { work, wasCommitted }: Transaction<T>): Promise<T> {
    return await wait.timed('database', async () => {
      for (let attempt = 1; ; attempt++) {
        let unanswered: { result: T } | undefined;
        try {
          return await this.#transactions.with(wait, async (connection) => {
            const result = await work(executorOf(connection, wait));
            wait.throwIfOver();
            try {
              await connection.commit(RESOLVE_COMMIT_MS);
            } catch (error) {
              if (!saysNotCommitted(error)) unanswered = { result };
              throw error;
            }
            return result;
          });
        } catch (error) {
          if (unanswered) {
            if (await this.#learnWhetherCommitted(wasCommitted, unanswered.result, error))
              return unanswered.result;
          } else if (error instanceof Refusal || kindOf(error) === 'defect') throw asRefusal(error);
          else if (kindOf(error) === 'conflict' && attempt >= CONFLICT_TRIES) throw asRefusal(error);
          await pauseBeforeRetry(attempt, wait, error);
        }
      }
    });
  }

  async #learnWhetherCommitted<T>(
    wasCommitted: Transaction<T>['wasCommitted'],
    result: T,
    cause: unknown,
  ): Promise<boolean> {
    const patience = Wait.forMs(RESOLVE_COMMIT_MS);
    for (let attempt = 1; ; attempt++) {
      try {
        return await this.#transactions.with(patience, async (connection) => {
          const answer = await wasCommitted(executorOf(connection, patience), result);
          await connection.rollback(PING_TIMEOUT_MS);
          return answer;
        });
      } catch (error) {
        if (kindOf(error) === 'defect' || patience.signal.aborted)
          throw unavailable(new AggregateError([error, cause], 'The outcome of a COMMIT is unknown'));
        await pauseBeforeRetry(attempt, patience, error);
      }
    }
  }

  /**
   * Runs `work` if nobody else, on any replica, is at it under the same name; else does nothing. The lock is the
   * server's and dies with its connection.
   */
  async exclusively(
    name: string,
    wait: Wait,
    work: (statements: Executor) => Promise<void>,
  ): Promise<boolean> {
    return await this.#statements.with(wait, async (connection) => {
      const statements = executorOf(connection, wait);
      // The server's locks have one namespace for all databases, and names of at most 64 characters.
      const lock = 'CONCAT(?, LEFT(SHA2(DATABASE(), 256), 32))';
      const [row] = await statements.rows<{ taken: number }>(`SELECT GET_LOCK(${lock}, 0) AS taken`, [name]);
      if (row?.taken !== 1) return false;
      try {
        await work(statements);
      } finally {
        // Given back even where nobody waits any more: the connection, and with it the lock, lives on in the pool.
        if (!connection.isBroken) {
          await executorOf(connection, Wait.forMs(PING_TIMEOUT_MS)).rows(`SELECT RELEASE_LOCK(${lock})`, [
            name,
          ]);
        }
      }
      return true;
    });
  }

  /** @throws whatever keeps the database from answering. */
  async ping(timeoutMs: number): Promise<void> {
    const wait = Wait.forMs(timeoutMs);
    await this.#statements.with(wait, (connection) => connection.execute('SELECT 1', [], wait));
  }

  /** Lets statements under way finish, then closes the connections. */
  async close(): Promise<void> {
    await Promise.all([this.#statements.close(), this.#transactions.close()]);
  }
}

function executorOf(connection: Connection, wait: Wait): Executor {
  return {
    rows: async <Row>(sql: string, parameters: readonly Parameter[] = []) =>
      (await connection.execute(sql, parameters, wait)) as Row[],
    write: async (sql, parameters = []) => {
      const { affectedRows, insertId } = (await connection.execute(sql, parameters, wait)) as ResultSetHeader;
      return { matched: affectedRows, insertId };
    },
  };
}

/** How to reach the database that the configuration names. */
export function connectionOptions({
  database,
  databaseCa,
}: Pick<Config, 'database' | 'databaseCa'>): ConnectionOptions {
  const url = new URL(database.url);
  return {
    host: url.hostname.replace(/^\[|\]$/g, ''),
    port: url.port === '' ? MYSQL_PORT : Number(url.port),
    user: decodeURIComponent(url.username),
    password: decodeURIComponent(url.password),
    database: decodeURIComponent(url.pathname.slice(1)),
    charset: 'utf8mb4_bin',
    timezone: 'Z',
    supportBigNumbers: true,
    connectTimeout: database.connect_timeout_ms,
    enableKeepAlive: true,
    keepAliveInitialDelay: TCP_KEEPALIVE_MS,
    ...(databaseCa ? { ssl: { ca: databaseCa, rejectUnauthorized: true } } : {}),
  };
}

/** mysql2's pool, with what it lacks: acquiring bounded by a deadline, proof of life, and nothing dirty put back. */
class ConnectionPool {
  readonly #pool: Pool;
  readonly #statementTimeoutMs: number;
  readonly #setUp: readonly string[];
  readonly #lastUsed = new WeakMap<object, number>();
  /** Connections last used before then lead to a server that has turned out to be no primary. */
  #distrustedBefore = 0;

  constructor({ database, databaseCa }: Pick<Config, 'database' | 'databaseCa'>, autocommit: boolean) {
    this.#statementTimeoutMs = database.statement_timeout_ms;
    this.#setUp = [
      'SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED',
      `SET SESSION autocommit = ${autocommit ? 1 : 0}, SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', ` +
        `SESSION time_zone = '+00:00', SESSION innodb_lock_wait_timeout = ${database.lock_wait_timeout_seconds}`,
    ];
    this.#pool = mysql.createPool({
      ...connectionOptions({ database, databaseCa }),
      connectionLimit: database.pool_size,
      maxIdle: database.pool_size,
      waitForConnections: true,
      queueLimit: WAITING_MAX,
    });
  }

  /** Lends a connection to `work`. Whatever `work` throws, the next borrower gets a clean one. */
  async with<T>(wait: Wait, work: (connection: Connection) => Promise<T>): Promise<T> {
    const connection = await this.#acquire(wait);
    try {
      const result = await work(connection);
      this.#release(connection);
      return result;
    } catch (error) {
      // The others may lead to the same server, and what it can still answer is out of date.
      if (isReadOnly(error)) this.#distrustedBefore = performance.now();
      // A refusal from within a transaction and an SQL error leave the connection sound; nothing else does.
      if (
        kindOf(error) !== 'lost' &&
        !connection.isBroken &&
        (await connection.isRolledBack(PING_TIMEOUT_MS))
      ) {
        this.#release(connection);
      } else connection.destroy();
      throw error;
    }
  }

  close(): Promise<void> {
    return new Promise((resolve, reject) => this.#pool.end((error) => (error ? reject(error) : resolve())));
  }

  #release(connection: Connection): void {
    this.#lastUsed.set(connection.raw, performance.now());
    connection.raw.release();
  }

  async #acquire(wait: Wait): Promise<Connection> {
    for (;;) {
      wait.throwIfOver();
      const raw = await this.#acquireRaw(wait);
      const connection = new Connection(raw, this.#statementTimeoutMs);
      const lastUsed = this.#lastUsed.get(raw);
      if (lastUsed !== undefined && lastUsed < this.#distrustedBefore) {
        connection.destroy();
        continue;
      }
      try {
        if (lastUsed === undefined) {
          const timeoutMs = Math.min(this.#statementTimeoutMs, wait.remainingMs());
          for (const statement of this.#setUp) await connection.query(statement, timeoutMs);
        } else if (performance.now() - lastUsed > PROVE_ALIVE_AFTER_MS) {
          await connection.ping(Math.min(PING_TIMEOUT_MS, wait.remainingMs()));
        }
        return connection;
      } catch (error) {
        connection.destroy();
        if (lastUsed === undefined) throw error;
      }
    }
  }

  /** mysql2 cannot be told to stop waiting, so a connection that comes too late is handed straight back. */
  async #acquireRaw(wait: Wait): Promise<PoolConnection> {
    let isOver = false;
    return await within<PoolConnection>(
      (done) =>
        this.#pool.getConnection((error, connection) => {
          if (isOver && !error) connection.release();
          else done(error, connection);
        }),
      wait.remainingMs(),
      wait.signal,
      () => {
        isOver = true;
        return new NoConnection(wait.signal.reason);
      },
    );
  }
}

/** One borrowed connection, every use of it bounded in time. */
class Connection {
  readonly raw: PoolConnection;
  readonly #statementTimeoutMs: number;
  isBroken = false;

  constructor(raw: PoolConnection, statementTimeoutMs: number) {
    this.raw = raw;
    this.#statementTimeoutMs = statementTimeoutMs;
  }

  async execute(
    sql: string,
    parameters: readonly Parameter[],
    wait: Wait,
  ): Promise<RowDataPacket[] | ResultSetHeader> {
    wait.throwIfOver();
    return await this.#bounded<RowDataPacket[] | ResultSetHeader>(
      (done) => this.raw.execute(sql, parameters as never[], done),
      this.#statementTimeoutMs,
      wait.signal,
    );
  }

  async query(sql: string, timeoutMs: number): Promise<void> {
    await this.#bounded((done) => this.raw.query(sql, done), timeoutMs);
  }

  async commit(timeoutMs: number): Promise<void> {
    await this.query('COMMIT', timeoutMs);
  }

  async rollback(timeoutMs: number): Promise<void> {
    await this.query('ROLLBACK', timeoutMs);
  }

  /** Rolls back whatever is open. @returns false if that did not work, and the connection is good for nothing. */
  async isRolledBack(timeoutMs: number): Promise<boolean> {
    try {
      await this.rollback(timeoutMs);
      return true;
    } catch {
      return false;
    }
  }

  async ping(timeoutMs: number): Promise<void> {
    await this.#bounded((done) => this.raw.ping((error) => done(error, undefined)), timeoutMs);
  }

  destroy(): void {
    this.isBroken = true;
    this.raw.destroy();
  }

  /** mysql2's own timeout leaves the statement running and the connection busy; here it ends the connection. */
  async #bounded<T>(start: Start<T>, timeoutMs: number, signal?: AbortSignal): Promise<T> {
    try {
      return await within(start, timeoutMs, signal, () => {
        this.destroy();
        return new StatementTimeout();
      });
    } catch (error) {
      if (kindOf(error) === 'lost') this.isBroken = true;
      throw error;
    }
  }
}

/** Begins something that tells its end to a callback of Node's kind. */
type Start<T> = (done: (error: QueryError | NodeJS.ErrnoException | null, result: T) => void) => void;

/** Settles as what is started does, or rejects with `over()` when the time is up or the signal aborts. */
function within<T>(
  start: Start<T>,
  timeoutMs: number,
  signal: AbortSignal | undefined,
  over: () => Error,
): Promise<T> {
  return new Promise((resolve, reject) => {
    const settle = (then: () => void) => {
      clearTimeout(timer);
      signal?.removeEventListener('abort', end);
      then();
    };
    const end = () => settle(() => reject(over()));
    const timer = setTimeout(end, Math.max(0, timeoutMs));
    signal?.addEventListener('abort', end, { once: true });
    try {
      start((error, result) => settle(() => (error ? reject(error) : resolve(result))));
    } catch (error) {
      settle(() => reject(error));
    }
  });
}

/** @throws Refusal if nobody waits for another attempt. */
async function pauseBeforeRetry(attempt: number, wait: Wait, error: unknown): Promise<void> {
  const pause = Math.min(RETRY_PAUSE_MAX_MS, RETRY_PAUSE_MS * 2 ** (attempt - 1)) * (0.5 + Math.random());
  if (wait.signal.aborted) wait.throwIfOver();
  if (wait.remainingMs() <= pause) throw unavailable(error);
  await sleep(pause);
}

function unavailable(cause: unknown): Refusal {
  return new Refusal('UNAVAILABLE', {
    retryAfterMs: Math.round(RETRY_AFTER_MS * (1 + Math.random())),
    cause,
  });
}

/** Refusals and defects stay what they are; a database that is away becomes UNAVAILABLE. */
function asRefusal(error: unknown): unknown {
  return error instanceof Refusal || kindOf(error) === 'defect' ? error : unavailable(error);
}
