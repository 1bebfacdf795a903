/** All that a measurement works with: a database server, filled databases, server processes, load clients. */
import { randomBytes } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import mysql, { type RowDataPacket } from 'mysql2/promise';
import { Wait } from '../src/call.ts';
import { loadConfig } from '../src/config.ts';
import { migrate } from '../src/mysql/migrate.ts';
import type { Argon2Parameters } from '../src/password/phc.ts';
import { createHasher } from '../src/server.ts';
import {
  type DatabaseKind,
  type PrivateDatabase,
  startPrivateDatabase,
} from '../test/support/private_database.ts';
import { type Environment, type ServerProcess, startServerProcess } from '../test/support/service.ts';
import { type Child, startChild } from './child.ts';
import type { BoundAnswer, BoundQuestion } from './hash_bound.ts';
import type { Load, LoadReport, Target } from './load_client.ts';
import type { PeerAnswer, PeerQuestion } from './peer_server.ts';
import { APP, PASSWORDS, type Population, populate, populatePeer } from './people.ts';
import { type CpuTime, cpuSince, cpuTime, machineCpuMs } from './processes.ts';
import { quantile, sum } from './statistics.ts';

export type Progress = (line: string) => void;

export interface StageOptions {
  readonly database: DatabaseKind;
  /** Megabytes. */
  readonly bufferPool: number;
  readonly cores: number;
  readonly engine: 'auto' | 'argon2' | 'node-rs';
}

/** A filled database of Rekey's. */
export interface Filled {
  readonly name: string;
  readonly url: string;
  readonly population: Population;
}

export interface Peer {
  readonly pid: number;
  readonly target: Target;
  end(): Promise<void>;
}

export type LoadClient = Child<Load, LoadReport>;

/** A load as it went, and what it cost each of the processes that were asked about. */
export interface Measured {
  readonly report: LoadReport;
  /** Successful calls. */
  readonly done: number;
  readonly perSecond: number;
  readonly cpu: readonly CpuTime[];
  /** CPU time of everything on the machine, in milliseconds. */
  readonly machineMs: number;
}

export class Stage {
  readonly options: StageOptions;
  readonly database: PrivateDatabase;
  readonly parameters: Argon2Parameters;
  readonly slots: number;
  readonly #passwordHash: string;
  readonly #progress: Progress;
  readonly #bound: Child<BoundQuestion, BoundAnswer>;
  readonly #endings: (() => Promise<unknown>)[] = [];

  private constructor(
    options: StageOptions,
    database: PrivateDatabase,
    passwordHash: string,
    parameters: Argon2Parameters,
    slots: number,
    bound: Child<BoundQuestion, BoundAnswer>,
    progress: Progress,
  ) {
    this.options = options;
    this.database = database;
    this.#passwordHash = passwordHash;
    this.parameters = parameters;
    this.slots = slots;
    this.#bound = bound;
    this.#progress = progress;
  }

  static async set(options: StageOptions, progress: Progress): Promise<Stage> {
    const redo = options.database === 'mariadb' ? '--innodb-log-file-size' : '--innodb-redo-log-capacity';
    const database = await startPrivateDatabase({
      kind: options.database,
      // As durable as MySQL is by default, and MariaDB where it has replicas: each commit flushed to both logs.
      args: [
        `--innodb-buffer-pool-size=${options.bufferPool}M`,
        `${redo}=512M`,
        '--server-id=1',
        '--log-bin=binlog',
        '--sync-binlog=1',
      ],
      progress,
    });
    // Everybody's first password has one hash: made once, with what the server is configured to.
    const environment = { REKEY_APPS: APP, REKEY_HASH_ENGINE: options.engine };
    const config = loadConfig(undefined, { ...environment, REKEY_DATABASE_URL: database.url('none') });
    const hasher = await createHasher(config);
    const passwordHash = await hasher.hash(PASSWORDS[0] as string, Wait.forMs(60_000));
    const { memory_kib: memoryKib, iterations, parallelism } = config.hash;
    const bound = await startChild<BoundQuestion, BoundAnswer>('./hash_bound.ts', {
      UV_THREADPOOL_SIZE: String(options.cores),
      REKEY_HASH_ENGINE: options.engine,
    });
    const parameters = { memoryKib, iterations, parallelism };
    return new Stage(options, database, passwordHash, parameters, config.slots, bound, progress);
  }

  async fill(name: string, population: Population): Promise<Filled> {
    this.#progress(
      `filling database ${name}: ${population.users.toLocaleString('en')} users with ${population.sessionsEach} sessions and audit records each`,
    );
    const url = await this.#createDatabase(name);
    await migrate(loadConfig(undefined, { REKEY_APPS: APP, REKEY_DATABASE_URL: url }), () => {});
    await populate(url, population, this.#passwordHash, this.#progress);
    return { name, url, population };
  }

  async startRekey(filled: Filled, environment: Environment = {}): Promise<ServerProcess> {
    const server = await startServerProcess({
      REKEY_LISTEN: '127.0.0.1:0',
      REKEY_APPS: APP,
      REKEY_LOG_FORMAT: 'json',
      REKEY_DATABASE_URL: filled.url,
      REKEY_HASH_ENGINE: this.options.engine,
      ...environment,
    });
    this.#endings.push(() => server.stop());
    await server.waitForHealth('SERVING');
    return server;
  }

  async startPeer(population: Population): Promise<Peer> {
    const databaseUrl = await this.#createDatabase('peer');
    const child = await startChild<PeerQuestion, PeerAnswer>('./peer_server.ts', {
      UV_THREADPOOL_SIZE: String(this.options.cores),
      REKEY_HASH_ENGINE: this.options.engine,
      NODE_ENV: 'production',
    });
    this.#endings.push(() => child.end());
    const secret = randomBytes(32).toString('hex');
    // As many connections as Rekey has by default, in both of its pools together.
    const { url } = await child.ask({ databaseUrl, poolSize: 20, secret, parameters: this.parameters });
    await populatePeer(databaseUrl, population, this.#passwordHash, this.#progress);
    return { pid: child.pid, target: { kind: 'better-auth', url, secret }, end: child.end };
  }

  async startClient(): Promise<LoadClient> {
    const client = await startChild<Load, LoadReport>('./load_client.ts');
    this.#endings.push(() => client.end());
    return client;
  }

  /** Changes a second that hashing alone allows: an own change is two hashes. */
  async boundPerSecond(seconds: number): Promise<number> {
    const { slots, parameters } = this;
    const { hashesPerSecond } = await this.#bound.ask({ slots, seconds, parameters });
    return hashesPerSecond / 2;
  }

  async engine(): Promise<string> {
    return (await this.#bound.ask({ slots: 1, seconds: 0.05, parameters: this.parameters })).engine;
  }

  /** The database server's own counters, by name, and `binlog`: how far the binary log has got, in bytes. */
  async counters(): Promise<Record<string, number>> {
    const db = await mysql.createConnection({ uri: this.database.url() });
    const [rows] = await db.query<RowDataPacket[]>('SHOW GLOBAL STATUS');
    const [logs] = await db.query<RowDataPacket[]>('SHOW BINARY LOGS');
    await db.end();
    return {
      ...Object.fromEntries(rows.map(({ Variable_name, Value }) => [Variable_name, Number(Value)])),
      binlog: sum(logs.map(({ File_size }) => Number(File_size))),
    };
  }

  async end(): Promise<void> {
    await Promise.allSettled(this.#endings.map((end) => end()));
    await this.#bound.end();
    await this.database.dispose();
  }

  async #createDatabase(name: string): Promise<string> {
    const db = await mysql.createConnection({ uri: this.database.url() });
    await db.query(`CREATE DATABASE ${name} CHARACTER SET utf8mb4`);
    await db.end();
    return this.database.url(name);
  }
}

/** Puts a load on and reads the processes' CPU time over just the part of it that is counted. */
export async function measure(
  client: LoadClient,
  load: Load,
  pids: readonly number[] = [],
): Promise<Measured> {
  const reporting = client.ask(load);
  reporting.catch(() => {});
  await sleep(load.warmUpSeconds * 1000);
  const before = pids.map(cpuTime);
  const machineBefore = machineCpuMs();
  await sleep(load.seconds * 1000);
  const cpu = pids.map((pid, index) => cpuSince(pid, before[index] as CpuTime));
  const machineMs = machineCpuMs() - machineBefore;
  const report = await reporting;
  const done = report.latencies.OK?.length ?? 0;
  return { report, done, perSecond: done / report.seconds, cpu, machineMs };
}

/** Until V8 has compiled what is called often, and every connection knows its statements. */
export async function warmUp(
  client: LoadClient,
  target: Target,
  people: readonly [number, number],
): Promise<void> {
  const load = { target, people, warmUpSeconds: 0, seconds: WARM_UP_SECONDS, deadlineMs: 15_000 };
  await measure(client, { ...load, call: 'change', arrivals: { callers: 16 } });
  if (target.kind !== 'rekey') return;
  await measure(client, { ...load, call: 'weak-password', arrivals: { callers: 16 } });
}

const WARM_UP_SECONDS = 2;

export const latency = ({ report }: Measured, outcome: string, q: number): number =>
  quantile(report.latencies[outcome] ?? [], q);

export const rekeyTarget = (filled: Filled, ...servers: readonly ServerProcess[]): Target => ({
  kind: 'rekey',
  addresses: servers.map(({ address }) => address),
  population: filled.name,
});
