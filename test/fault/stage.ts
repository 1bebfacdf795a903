/** Where the laboratory plays: a database, a proxy in front of it, and server processes that can be killed and started again. */
import { type ChildProcess, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import type { Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import mysql, { type Connection, type RowDataPacket } from 'mysql2/promise';
import { Wait } from '../../src/call.ts';
import { loadConfig } from '../../src/config.ts';
import { migrate } from '../../src/mysql/migrate.ts';
import { Database } from '../../src/mysql/pool.ts';
import { newToken } from '../../src/mysql/sessions.ts';
import { insertUser } from '../../src/mysql/users.ts';
import type { Hasher } from '../../src/password/hasher.ts';
import { createHasher } from '../../src/server.ts';
import { debianRoot } from '../support/debian.ts';
import { startWireProxy, type WireProxy } from '../support/mysql_wire.ts';
import { freePort, type PrivateDatabase } from '../support/private_database.ts';
import { createLedger } from './ledger.ts';

export const PROJECT = fileURLToPath(new URL('../../', import.meta.url));

const DATABASE_NAME = 'rekey_fault';
const START_TIMEOUT_MS = 60_000;
const PATIENCE_MS = 60_000;
const LOG_LINES_KEPT = 2000;
/** A server that never lets go of a row must not hold up who looks for that. */
const LOCK_WAIT_S = 3;

/** Quick hashes, guards out of the way, and bounds so short that faults are met within seconds. */
export const QUICK: Record<string, string> = {
  REKEY_APPS: 'CRM',
  REKEY_LOG_FORMAT: 'json',
  REKEY_LOG_LEVEL: 'warn',
  REKEY_REFLECTION: 'false',
  REKEY_HASH_MEMORY_KIB: '8',
  REKEY_HASH_ITERATIONS: '1',
  REKEY_POLICY_MIN_COMPLEXITY: '0',
  REKEY_GUARD_OLD_PASSWORD_ATTEMPTS: '100',
  REKEY_GUARD_LOGIN_ATTEMPTS: '100',
  REKEY_GUARD_LOGIN_ATTEMPTS_PER_ADDRESS: '100000',
  REKEY_GUARD_WINDOW_SECONDS: '1',
  REKEY_DATABASE_CONNECT_TIMEOUT_MS: '1000',
  REKEY_DATABASE_STATEMENT_TIMEOUT_MS: '1500',
  REKEY_DATABASE_LOCK_WAIT_TIMEOUT_SECONDS: '1',
};

/** The clock that the server processes see. */
export interface Clock {
  /** Seconds from the real time, for processes that run and those to come. */
  shift(seconds: number): Promise<void>;
  readonly environment: Record<string, string>;
}

/** One place where a server process runs, dies, and runs again, always on the same port. */
export class ServerPlace {
  readonly name: string;
  readonly port: number;
  readonly url: string;
  /** What the process logged, over all its lives: the last lines. */
  readonly lines: string[] = [];
  readonly #root: string;
  readonly #environment: Record<string, string>;
  #child: ChildProcess | undefined;
  #exited: Promise<{ code: number | null; signal: NodeJS.Signals | null }> | undefined;

  constructor(name: string, root: string, port: number, environment: Record<string, string>) {
    this.name = name;
    this.port = port;
    this.url = `http://127.0.0.1:${port}`;
    this.#root = root;
    this.#environment = { ...environment, REKEY_LISTEN: `127.0.0.1:${port}` };
  }

  get pid(): number | undefined {
    return this.#child?.pid;
  }

  get isRunning(): boolean {
    return this.#child !== undefined;
  }

  async start(): Promise<void> {
    const clean = Object.fromEntries(
      Object.entries(process.env).filter(([name]) => !name.startsWith('REKEY_')),
    );
    const child = spawn(process.execPath, [join(this.#root, 'src/main.ts'), 'serve'], {
      env: { ...clean, ...this.#environment },
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    this.#child = child;
    // The system closes the pipe when this process is gone, however it went.
    const watchdog = spawn(
      '/bin/sh',
      ['-c', 'read -r _; kill -KILL "$1" 2>/dev/null', 'sh', String(child.pid)],
      {
        stdio: ['pipe', 'ignore', 'ignore'],
        detached: true,
      },
    );
    watchdog.unref();
    (watchdog.stdin as Socket).unref();
    for (const stream of [child.stdout, child.stderr]) {
      let rest = '';
      stream?.setEncoding('utf8').on('data', (text: string) => {
        const parts = (rest + text).split('\n');
        rest = parts.pop() ?? '';
        this.lines.push(...parts);
        if (this.lines.length > 2 * LOG_LINES_KEPT) this.lines.splice(0, this.lines.length - LOG_LINES_KEPT);
      });
    }
    this.#exited = once(child, 'close').then(([code, signal]) => {
      watchdog.kill('SIGKILL');
      if (this.#child === child) this.#child = undefined;
      return { code, signal };
    });
    const deadline = Date.now() + START_TIMEOUT_MS;
    while (!(await isListening(this.port))) {
      if (this.#child !== child)
        throw new Error(`${this.name} ended while starting:\n${this.lines.slice(-20).join('\n')}`);
      if (Date.now() > deadline) throw new Error(`${this.name} did not start within ${START_TIMEOUT_MS} ms`);
      await sleep(20);
    }
  }

  signal(signal: NodeJS.Signals): void {
    this.#child?.kill(signal);
  }

  /** Ends the process and waits for it. */
  async end(
    signal: NodeJS.Signals,
  ): Promise<{ code: number | null; signal: NodeJS.Signals | null } | undefined> {
    this.signal(signal);
    return await this.#exited;
  }
}

function isListening(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    import('node:net').then(({ createConnection }) => {
      const socket = createConnection({ host: '127.0.0.1', port });
      socket.once('connect', () => {
        socket.destroy();
        resolve(true);
      });
      socket.once('error', () => resolve(false));
    });
  });
}

export interface Stage {
  readonly proxy: WireProxy;
  readonly servers: readonly ServerPlace[];
  readonly hasher: Hasher;
  /** Absent: the reason is in `noClock`. */
  readonly clock: Clock | undefined;
  readonly noClock: string;
  /** A new connection to the database itself, past the proxy. */
  connect(): Promise<Connection>;
  createUser(user: { username: string; password: string; isSuperUser?: boolean }): Promise<string>;
  /** @returns the session's token. */
  openSession(userId: string): Promise<string>;
  /** Waits until the database has no transaction left that a server began. */
  waitForCalm(): Promise<void>;
  dispose(): Promise<void>;
}

export interface StageOptions {
  /** URL of the server to play on, without a database name; asked again at each connection. */
  databaseUrl: () => string;
  /** Where `src/main.ts` of the server under test is; absent: this project. */
  root?: string;
  servers?: number;
  environment?: Record<string, string>;
  /** Whether the servers' clock is to be shifted. */
  clock?: boolean;
  progress?: (line: string) => void;
}

export async function buildStage({
  databaseUrl,
  root = PROJECT,
  servers: count = 2,
  environment = {},
  clock: wantsClock = false,
  progress = () => {},
}: StageOptions): Promise<Stage> {
  const url = () => {
    const named = new URL(databaseUrl());
    named.pathname = `/${DATABASE_NAME}`;
    return named.href;
  };
  const admin = await mysql.createConnection({ uri: databaseUrl() });
  await admin.query(`DROP DATABASE IF EXISTS ${DATABASE_NAME}`);
  await admin.query(`CREATE DATABASE ${DATABASE_NAME} CHARACTER SET utf8mb4`);
  admin.destroy();

  const proxy = await startWireProxy(databaseUrl());
  const { clock, noClock, dispose: disposeClock } = wantsClock ? await startClock(progress) : NO_CLOCK;
  const variables = { ...QUICK, ...environment, REKEY_DATABASE_URL: proxy.through(url()) };
  const config = () =>
    loadConfig(undefined, { ...variables, REKEY_LISTEN: '127.0.0.1:0', REKEY_DATABASE_URL: url() });
  await migrate(config(), () => {});
  const hasher = await createHasher(config());
  const connect = async () => {
    const db = await mysql.createConnection({ uri: url(), timezone: 'Z', connectTimeout: 3000 });
    await db.query(`SET SESSION innodb_lock_wait_timeout = ${LOCK_WAIT_S}`);
    return db;
  };
  const setUp = await connect();
  await createLedger(setUp);
  setUp.destroy();

  let database = new Database(config());
  let databaseOf = url();
  const statements = () => {
    if (databaseOf !== url()) {
      database.close().catch(() => {});
      databaseOf = url();
      database = new Database(config());
    }
    return database.statements(Wait.forMs(PATIENCE_MS));
  };
  const servers: ServerPlace[] = [];
  for (let index = 0; index < count; index++) {
    const place = new ServerPlace(`server ${index + 1}`, root, await freePort(), {
      ...variables,
      ...(clock?.environment ?? {}),
    });
    servers.push(place);
  }
  await Promise.all(servers.map((server) => server.start()));

  return {
    proxy,
    servers,
    hasher,
    clock,
    noClock,
    connect,
    createUser: async ({ username, password, isSuperUser = false }) =>
      insertUser(statements(), {
        username,
        displayName: '',
        email: '',
        isSuperUser,
        approval: 'approved',
        passwordHash: await hasher.hash(password, Wait.forMs(PATIENCE_MS)),
        passwordExpiryDays: 365,
        mustChange: false,
      }),
    openSession: async (userId) => {
      const token = newToken();
      await statements().write(
        `INSERT INTO sessions (token_hash, user_id, app, remote_addr, opened_at, expires_at)
         VALUES (?, ?, 'CRM', '127.0.0.1', UTC_TIMESTAMP(6), UTC_TIMESTAMP(6) + INTERVAL 1 DAY)`,
        [createHash('sha256').update(token).digest(), userId],
      );
      return token;
    },
    waitForCalm: async () => {
      const deadline = Date.now() + PATIENCE_MS;
      const db = await connect();
      try {
        for (;;) {
          const [rows] = await db.query<RowDataPacket[]>(
            'SELECT trx_mysql_thread_id AS id FROM information_schema.innodb_trx WHERE trx_mysql_thread_id <> CONNECTION_ID() AND trx_mysql_thread_id > 0',
          );
          if (rows.length === 0 && proxy.underWay === 0) return;
          if (Date.now() > deadline) throw new Error('transactions stay open');
          await sleep(50);
        }
      } finally {
        db.destroy();
      }
    },
    dispose: async () => {
      await Promise.all(servers.map((server) => server.end('SIGKILL')));
      await Promise.race([database.close().catch(() => {}), sleep(1000)]);
      await proxy.close();
      await disposeClock();
    },
  };
}

const NO_CLOCK = { clock: undefined, noClock: 'not asked for', dispose: async () => {} };

/** libfaketime, out of Debian's package, reading what time it is from a file. */
async function startClock(
  progress: (line: string) => void,
): Promise<{ clock: Clock | undefined; noClock: string; dispose: () => Promise<void> }> {
  let library: string;
  try {
    const root = await debianRoot({ name: 'faketime', packages: ['libfaketime'] }, progress);
    library = join(root.directory, 'usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1');
  } catch (error) {
    return { ...NO_CLOCK, noClock: `libfaketime cannot be had: ${(error as Error).message}` };
  }
  const directory = await mkdtemp(join(tmpdir(), 'rekey-clock-'));
  const file = join(directory, 'now');
  const write = (seconds: number) => writeFile(file, `${seconds < 0 ? '-' : '+'}${Math.abs(seconds)}\n`);
  await write(0);
  const environment = {
    LD_PRELOAD: library,
    FAKETIME_TIMESTAMP_FILE: file,
    FAKETIME_CACHE_DURATION: '1',
    FAKETIME_DONT_FAKE_MONOTONIC: '1',
  };
  const dispose = () => rm(directory, { recursive: true, force: true });
  const seen = await timeSeenWith(environment, write);
  if (Math.abs(seen - 3600) > 60) {
    await dispose();
    return {
      ...NO_CLOCK,
      noClock: `libfaketime does not work here: 3600 s were asked for and ${seen} s seen`,
    };
  }
  return { clock: { environment, shift: write }, noClock: '', dispose };
}

async function timeSeenWith(
  environment: Record<string, string>,
  write: (seconds: number) => Promise<void>,
): Promise<number> {
  await write(3600);
  const child = spawn(process.execPath, ['-p', 'Date.now()'], {
    env: { ...process.env, ...environment },
    stdio: ['ignore', 'pipe', 'ignore'],
  });
  let text = '';
  child.stdout.setEncoding('utf8').on('data', (part: string) => {
    text += part;
  });
  await once(child, 'close');
  await write(0);
  return Math.round((Number(text) - Date.now()) / 1000);
}

/** A private server with the options that the ledger wants: its rows must never hold anything up. */
export const LEDGER_SERVER_ARGS = ['--innodb-autoinc-lock-mode=2'];

export async function restartUntilItRuns(database: PrivateDatabase): Promise<void> {
  for (let attempt = 1; ; attempt++) {
    try {
      return await database.start();
    } catch (error) {
      if (attempt === 3) throw error;
      await database.kill();
    }
  }
}
