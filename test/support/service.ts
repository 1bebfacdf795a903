/**
 * The real server process on a database of its own, and all that a test over the wire needs around it: people and
 * their sessions, a client, direct SQL, and the lines that were logged. Whatever comes over the wire or into a
 * log is searched for the secrets that were used.
 */
import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { randomBytes, randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { createConnection, createServer, type Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import type { DescService, MessageInitShape, MessageShape } from '@bufbuild/protobuf';
import { durationMs } from '@bufbuild/protobuf/wkt';
import { Code, type Client as ConnectClient, ConnectError, createClient } from '@connectrpc/connect';
import { createGrpcTransport, Http2SessionManager } from '@connectrpc/connect-node';
import { type ChannelCredentials, credentials, makeGenericClientConstructor } from '@grpc/grpc-js';
import { service as healthService } from 'grpc-health-check';
import mysql, { type Connection, type RowDataPacket } from 'mysql2/promise';
import {
  BadRequestSchema,
  ErrorInfoSchema,
  RequestInfoSchema,
  RetryInfoSchema,
} from '../../gen/google/rpc/error_details_pb.ts';
import {
  type ChangePasswordRequestSchema,
  type ChangePasswordResponseSchema,
  UserService,
} from '../../gen/rekey/v1/user_service_pb.ts';
import { Wait } from '../../src/call.ts';
import { type Config, loadConfig } from '../../src/config.ts';
import { migrate } from '../../src/mysql/migrate.ts';
import { Database } from '../../src/mysql/pool.ts';
import { insertSession, newToken } from '../../src/mysql/sessions.ts';
import { type Approval, insertUser, setLocked } from '../../src/mysql/users.ts';
import type { Hasher } from '../../src/password/hasher.ts';
import { createHasher } from '../../src/server.ts';
import { createTestDatabase } from './private_database.ts';

export type ChangeMessage = MessageInitShape<typeof ChangePasswordRequestSchema>;
export type ChangeResponse = MessageShape<typeof ChangePasswordResponseSchema>;
export type Metadata = Record<string, string>;
/** `REKEY_…` variables, over those that make tests quick. */
export type Environment = Record<string, string>;

/** How long a test waits for something that is bound to happen; generous, because the machine may be busy. */
const PATIENCE_MS = 30_000;
const POLL_MS = 20;
const ROOT = fileURLToPath(new URL('../..', import.meta.url));
/** What `npm run rekey` runs, so that what is tested and measured is started as it is in earnest: `A=b node --c src/d`. */
const REKEY = (JSON.parse(readFileSync(`${ROOT}package.json`, 'utf8')).scripts.rekey as string)
  .split(' ')
  .map((part) => part.replace(/(?<=^|=)(?=src\/|node_modules\/)/, () => ROOT));
const NODE = REKEY.indexOf('node');
const STARTED_WITH = Object.fromEntries(REKEY.slice(0, NODE).map((assignment) => assignment.split('=')));

const QUICK: Environment = {
  REKEY_LISTEN: '127.0.0.1:0',
  REKEY_APPS: 'CRM,ERP',
  REKEY_LOG_FORMAT: 'json',
  REKEY_HASH_MEMORY_KIB: '64',
  REKEY_HASH_ITERATIONS: '1',
};

/** Waits until `look` finds something (neither undefined nor false). */
export async function eventually<T>(
  what: string,
  look: () => T | undefined | false | Promise<T | undefined | false>,
  { patienceMs = PATIENCE_MS, pollMs = POLL_MS } = {},
): Promise<T> {
  const deadline = performance.now() + patienceMs;
  for (;;) {
    const found = await look();
    if (found !== undefined && found !== false) return found;
    if (performance.now() > deadline) assert.fail(`waited ${patienceMs} ms in vain: ${what}`);
    await sleep(pollMs);
  }
}

/** A password that no policy minds. */
export const strongPassword = () => `Kv7-${randomBytes(12).toString('base64url')}`;

// ---- answers ----------------------------------------------------------------------------------------------------

/** What a caller got, errors taken apart. */
export interface Answer<R = ChangeResponse> {
  /** `OK`, `INVALID_ARGUMENT` … */
  readonly code: string;
  readonly message: string;
  /** Of ErrorInfo; empty if there is none. */
  readonly reason: string;
  readonly domain: string;
  /** Of ErrorInfo. */
  readonly metadata: Readonly<Record<string, string>>;
  /** From the response's own metadata. */
  readonly cid: string | null;
  /** Of RequestInfo. */
  readonly requestId: string | undefined;
  /** `field REASON`, sorted. */
  readonly violations: readonly string[];
  readonly descriptions: readonly string[];
  /** Of RetryInfo. */
  readonly retryMs: number | undefined;
  readonly detailTypes: readonly string[];
  readonly response: R | undefined;
}

/** The names of gRPC's status codes, by their number. */
export const codeName = (code: Code | number): string =>
  code === Code.Canceled
    ? 'CANCELLED'
    : (Code[code] as string).replace(/(?<=[a-z])(?=[A-Z])/g, '_').toUpperCase();

function failure(error: ConnectError): Answer<never> {
  const [info] = error.findDetails(ErrorInfoSchema);
  const [requestInfo] = error.findDetails(RequestInfoSchema);
  const [badRequest] = error.findDetails(BadRequestSchema);
  const [retryInfo] = error.findDetails(RetryInfoSchema);
  const violations = badRequest?.fieldViolations ?? [];
  return {
    code: codeName(error.code),
    message: error.rawMessage,
    reason: info?.reason ?? '',
    domain: info?.domain ?? '',
    metadata: info?.metadata ?? {},
    cid: error.metadata.get('cid'),
    requestId: requestInfo?.requestId,
    violations: violations.map(({ field, reason }) => `${field} ${reason}`).sort(),
    descriptions: violations.map(({ description }) => description),
    retryMs: retryInfo?.retryDelay && durationMs(retryInfo.retryDelay),
    detailTypes: error.details.map((detail) => ('type' in detail ? detail.type : detail.desc.typeName)),
    response: undefined,
  };
}

const TRAILERS_MAX_BYTES = 8192;
const LEAKS =
  /\b(SELECT|INSERT|UPDATE|DELETE|FROM users|password_hash|argon2|mysql|mariadb|node_modules|ECONN\w+|ER_\w+)\b|\$argon2|(^|[\s"'(])\/(home|root|tmp|usr|var|work|etc)\/|\.ts\b|\bat .+:\d+:\d+/i;

/** What holds for every error, whatever it is about (AIP-193), and that nothing of the inside is in it. */
export function checkError(error: ConnectError, secrets: ReadonlySet<string>): void {
  const answer = failure(error);
  assert.equal(new Set(answer.detailTypes).size, answer.detailTypes.length, 'each detail type once at most');
  if (answer.reason !== '') {
    assert.match(answer.reason, /^[A-Z][A-Z0-9_]+[A-Z0-9]$/);
    assert.ok(answer.reason.length <= 63);
    assert.equal(answer.domain, 'rekey');
    assert.equal(answer.metadata.cid, answer.cid);
    assert.equal(answer.requestId, answer.cid);
  }
  const trailers = [...error.metadata].map(([key, value]) => `${key}: ${value}`).join('\n');
  assert.ok(Buffer.byteLength(trailers) < TRAILERS_MAX_BYTES, 'trailers are small');
  const details = error.details
    .map((detail) => ('type' in detail ? Buffer.from(detail.value).toString('latin1') : ''))
    .join('\n');
  const { cid, ...metadata } = answer.metadata;
  const prose = [answer.message, ...answer.descriptions, ...Object.values(metadata)].join('\n');
  // Without metadata it is the client's own: no answer came.
  if (trailers !== '') assert.doesNotMatch(prose, LEAKS);
  assertNoSecret(`${error.rawMessage}\n${trailers}\n${details}`, secrets, `the error ${answer.reason}`);
}

/** Shorter ones turn up in innocent text by chance. */
const SECRET_MIN_LENGTH = 7;

export function assertNoSecret(text: string, secrets: ReadonlySet<string>, where: string): void {
  for (const secret of secrets) {
    if (secret.length >= SECRET_MIN_LENGTH && text.includes(secret)) assert.fail(`a secret is in ${where}`);
  }
}

// ---- the server process -----------------------------------------------------------------------------------------

export interface LogLine {
  readonly level: string;
  readonly msg: string;
  readonly cid?: string;
  readonly [key: string]: unknown;
}

export interface ServerProcess {
  readonly pid: number;
  /** host:port */
  readonly address: string;
  readonly environment: Environment;
  /** Standard output, a line each. */
  readonly lines: readonly string[];
  readonly stderr: string;
  readonly log: readonly LogLine[];
  /** Resolves when the process has ended. */
  readonly exited: Promise<{ code: number | null; signal: NodeJS.Signals | null }>;
  /** A call of ChangePassword; errors are answers, and each of them is checked for what holds for every error. */
  change(metadata: Metadata, message: ChangeMessage, options?: CallOptions): Promise<Answer>;
  client<S extends DescService>(service: S): ConnectClient<S>;
  /** Any other call, its errors treated in the same way. */
  answerOf<R>(call: (onHeader: (headers: Headers) => void) => Promise<R>): Promise<Answer<R>>;
  /** The line of the call with this cid, once it is written. */
  lineOf(cid: string): Promise<LogLine>;
  signal(signal: NodeJS.Signals): void;
  waitFor(what: string, isIt: (line: LogLine) => boolean): Promise<LogLine>;
  waitForHealth(status: HealthStatus): Promise<void>;
  /** SIGTERM, and what came of it. */
  stop(): Promise<{ code: number | null; signal: NodeJS.Signals | null }>;
  kill(): Promise<void>;
}

/** What a client needs to speak TLS with the server; with `cert` and `key` to prove itself. */
export interface Tls {
  ca: Buffer;
  cert?: Buffer;
  key?: Buffer;
}

export interface CallOptions {
  timeoutMs?: number;
  signal?: AbortSignal;
}

export type HealthStatus = 'SERVING' | 'NOT_SERVING' | 'UNKNOWN' | 'SERVICE_UNKNOWN';

const HealthClient = makeGenericClientConstructor(healthService, 'Health');

/** A client of `grpc.health.v1.Health`; to be closed. */
export const healthClient = (address: string, creds: ChannelCredentials = credentials.createInsecure()) =>
  new HealthClient(address, creds) as unknown as {
    check(
      request: { service: string },
      done: (error: Error | null, response?: { status: HealthStatus }) => void,
    ): void;
    watch(request: { service: string }): AsyncIterable<{ status: HealthStatus }> & { cancel(): void };
    close(): void;
  };

export function checkHealth(address: string, service = ''): Promise<HealthStatus | undefined> {
  const health = healthClient(address);
  return new Promise((resolve) =>
    health.check({ service }, (_error, response) => {
      health.close();
      resolve(response?.status);
    }),
  );
}

/** This process's own variables without those that configure Rekey. */
const cleanEnvironment = () =>
  Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith('REKEY_')));

const alive = new Set<ChildProcess>();
process.on('exit', () => {
  for (const child of alive) child.kill('SIGKILL');
});

/**
 * Runs `rekey` with these arguments until it ends. It ends with this process, however that goes: the system
 * then closes the pipe that the watchdog reads from.
 */
export function spawnRekey(
  args: readonly string[],
  environment: Environment,
): { child: ChildProcess; exited: ServerProcess['exited']; lines: string[]; stderr: () => string } {
  const child = spawn(process.execPath, [...REKEY.slice(NODE + 1), ...args], {
    env: { ...cleanEnvironment(), ...STARTED_WITH, ...environment },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  alive.add(child);
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
  const lines: string[] = [];
  let rest = '';
  child.stdout?.setEncoding('utf8').on('data', (text: string) => {
    const parts = (rest + text).split('\n');
    rest = parts.pop() ?? '';
    lines.push(...parts);
  });
  let stderr = '';
  child.stderr?.setEncoding('utf8').on('data', (text: string) => {
    stderr += text;
  });
  const exited = once(child, 'close').then(([code, signal]) => {
    alive.delete(child);
    watchdog.kill('SIGKILL');
    return { code, signal };
  });
  return { child, exited, lines, stderr: () => stderr };
}

/** `rekey serve`, listening. */
export async function startServerProcess(
  environment: Environment,
  { secrets = new Set<string>(), args = [] as string[], tls = undefined as Tls | undefined } = {},
): Promise<ServerProcess> {
  const { child, exited, lines, stderr } = spawnRekey(['serve', ...args], environment);
  const log: LogLine[] = [];
  const parsed = () => {
    while (log.length < lines.length) log.push(JSON.parse(lines[log.length] as string));
    return log;
  };
  let ended = false;
  exited.then(() => (ended = true));
  const waitFor = (what: string, isIt: (line: LogLine) => boolean) =>
    eventually(what, () => {
      const found = parsed().find(isIt);
      if (!found && ended) assert.fail(`the server ended before: ${what}\n${lines.join('\n')}\n${stderr()}`);
      return found;
    });
  const address = String((await waitFor('listening', ({ msg }) => msg.startsWith('listening on'))).address);

  const baseUrl = `${tls ? 'https' : 'http'}://${address}`;
  const nodeOptions = tls ? { ...tls } : {};
  const sessions = new Http2SessionManager(baseUrl, undefined, nodeOptions);
  const transport = createGrpcTransport({ baseUrl, nodeOptions, sessionManager: sessions });
  const users = createClient(UserService, transport);

  const answerOf: ServerProcess['answerOf'] = async (call) => {
    let cid: string | null = null;
    try {
      const response = await call((headers) => {
        cid = headers.get('cid');
      });
      return { ...NO_ERROR, cid, response };
    } catch (error) {
      if (!(error instanceof ConnectError)) throw error;
      checkError(error, secrets);
      return failure(error);
    }
  };
  return {
    pid: child.pid as number,
    address,
    environment,
    lines,
    get stderr() {
      return stderr();
    },
    get log() {
      return parsed();
    },
    exited,
    client: (service) => createClient(service, transport),
    answerOf,
    change: (headers, message, options = {}) => {
      for (const text of [message.oldPassword, message.newPassword, headers.ust]) if (text) secrets.add(text);
      return answerOf((onHeader) => users.changePassword(message, { headers, onHeader, ...options }));
    },
    lineOf: (cid) => waitFor(`the log line of ${cid}`, (line) => line.msg === 'call' && line.cid === cid),
    signal: (signal) => void child.kill(signal),
    waitFor,
    waitForHealth: async (status) => {
      let last: HealthStatus | undefined;
      const look = async () => {
        if (ended) assert.fail(`the server ended\n${lines.join('\n')}\n${stderr()}`);
        last = await checkHealth(address);
        return last === status;
      };
      await eventually(`health ${status}`, look).catch((error) => {
        throw new Error(`health is ${last}, not ${status}; the log:\n${lines.join('\n')}\n${stderr()}`, {
          cause: error,
        });
      });
    },
    stop: async () => {
      sessions.abort();
      child.kill('SIGTERM');
      return await exited;
    },
    kill: async () => {
      child.kill('SIGKILL');
      await exited;
      sessions.abort();
    },
  };
}

const NO_ERROR = {
  code: 'OK',
  message: '',
  reason: '',
  domain: '',
  metadata: {},
  requestId: undefined,
  violations: [],
  descriptions: [],
  retryMs: undefined,
  detailTypes: [],
} as const;

// ---- the service: database, people, processes -------------------------------------------------------------------

export interface UserOptions {
  username?: string;
  displayName?: string;
  email?: string;
  password?: string;
  isSuperUser?: boolean;
  isLocked?: boolean;
  approval?: Approval;
  mustChange?: boolean;
  hasExpired?: boolean;
}

export interface TestUser {
  readonly userId: string;
  readonly username: string;
  readonly password: string;
  /** Of a session opened from CRM. */
  readonly ust: string;
}

export interface AuditRow extends RowDataPacket {
  cid: string;
  action: string;
  outcome: string;
  reason: string;
  actor_user_id: string | null;
  target_user_id: string | null;
  app: string;
  remote_addr: string;
  peer_addr: string | null;
  claimed_addr: string | null;
  request: string;
}

export interface Service {
  /** The first server process. */
  readonly server: ServerProcess;
  /** Those that were there from the start. */
  readonly servers: readonly ServerProcess[];
  readonly databaseUrl: string;
  /** Only where it was asked for. */
  readonly gate: Gate | undefined;
  readonly db: Connection;
  readonly hasher: Hasher;
  /** Everything that must never be seen in an error or a log. */
  readonly secrets: Set<string>;
  /** Another process on the same database, ended with the rest. */
  startServer(environment?: Environment, options?: { args?: string[]; tls?: Tls }): Promise<ServerProcess>;
  createUser(options?: UserOptions): Promise<TestUser>;
  /** @returns the UST. */
  openSession(userId: string, options?: { app?: string; lifetimeSeconds?: number }): Promise<string>;
  sql<Row extends RowDataPacket = RowDataPacket>(statement: string, parameters?: unknown[]): Promise<Row[]>;
  /** The audit records with this cid. */
  auditOf(cid: string): Promise<AuditRow[]>;
  /**
   * Holds the locks on a user's sessions (or on the user's own row) while `work` runs, so that a change by this user
   * (or a log-in) waits in its transaction, with everything verified. Commits what `work` did with `sql`.
   */
  whileLocked<T>(userId: string, work: () => Promise<T>, table?: 'sessions' | 'users'): Promise<T>;
  /** Until as many transactions on this database wait for a row's lock. */
  waitForLockWaits(count?: number): Promise<void>;
  storedHash(userId: string): Promise<string>;
  isPassword(userId: string, password: string): Promise<boolean>;
  /** Ends all of it, and checks that nothing that was logged holds a secret. */
  stop(): Promise<void>;
}

export interface ServiceOptions {
  /** How many server processes. */
  servers?: number;
  /** Puts a gate between the server processes and their database. */
  gated?: boolean;
  /** A migrated database that somebody else drops; absent: a fresh one. */
  databaseUrl?: string;
}

export async function startService(
  environment: Environment = {},
  { servers: count = 1, databaseUrl, gated = false }: ServiceOptions = {},
): Promise<Service> {
  const testDatabase = databaseUrl === undefined ? await createTestDatabase() : undefined;
  const url = databaseUrl ?? (testDatabase as { url: string }).url;
  const gate = gated ? await databaseGate(url) : undefined;
  const variables = { ...QUICK, REKEY_DATABASE_URL: gate?.url ?? url, ...environment };
  // The test's own access does not go through the gate.
  const config: Config = loadConfig(undefined, { ...variables, REKEY_DATABASE_URL: url });
  await migrate(config, () => {});
  const hasher = await createHasher(config);
  const database = new Database(config);
  const statements = () => database.statements(Wait.forMs(PATIENCE_MS));
  const db = await mysql.createConnection({ uri: url, timezone: 'Z', charset: 'utf8mb4_bin' });
  const secrets = new Set<string>();
  const servers: ServerProcess[] = [];

  const sql: Service['sql'] = async (statement, parameters = []) => {
    const [rows] = await db.query<RowDataPacket[]>(statement, parameters);
    return rows as never;
  };
  const startServer: Service['startServer'] = async (more = {}, options = {}) => {
    const server = await startServerProcess({ ...variables, ...more }, { secrets, ...options });
    servers.push(server);
    return server;
  };
  const openSession: Service['openSession'] = async (
    userId,
    { app = 'CRM', lifetimeSeconds = 3600 } = {},
  ) => {
    const token = newToken();
    secrets.add(token);
    const [row] = await sql('SELECT UTC_TIMESTAMP(6) AS now');
    const openedAt: Date = row?.now;
    const expiresAt = new Date(openedAt.getTime() + lifetimeSeconds * 1000);
    await insertSession(statements(), {
      token,
      userId,
      app,
      remoteAddress: '127.0.0.1',
      openedAt,
      expiresAt,
    });
    return token;
  };
  const storedHash: Service['storedHash'] = async (userId) => {
    const [row] = await sql('SELECT password_hash FROM users WHERE user_id = ?', [userId]);
    return String(row?.password_hash);
  };

  const whileLocked: Service['whileLocked'] = async (userId, work, table = 'sessions') => {
    await db.beginTransaction();
    try {
      await sql(`SELECT 1 FROM ${table} WHERE user_id = ? FOR UPDATE`, [userId]);
      const result = await work();
      await db.commit();
      return result;
    } finally {
      await db.rollback();
    }
  };
  const waitForLockWaits: Service['waitForLockWaits'] = async (count = 1) => {
    const look = async () => {
      const rows = await sql(
        `SELECT t.trx_id FROM information_schema.innodb_trx t
         JOIN information_schema.processlist p ON p.id = t.trx_mysql_thread_id
         WHERE t.trx_state = 'LOCK WAIT' AND p.db = DATABASE()`,
      );
      return rows.length >= count;
    };
    // InnoDB renews this table only when nobody has read it for 100 ms; a look before that may see the past.
    const pollMs = 110 + 60 * Math.random();
    await sleep(pollMs);
    await eventually(`${count} transactions wait for a lock`, look, { pollMs });
  };

  const service: Service = {
    get server() {
      return servers[0] as ServerProcess;
    },
    get servers() {
      return servers.slice(0, count);
    },
    databaseUrl: url,
    gate,
    db,
    hasher,
    secrets,
    startServer,
    openSession,
    sql,
    whileLocked,
    waitForLockWaits,
    storedHash,
    createUser: async (options = {}) => {
      const { password = strongPassword(), username = `u-${randomUUID()}` } = options;
      const passwordHash = await hasher.hash(password.normalize('NFC'), Wait.forMs(PATIENCE_MS));
      secrets.add(password).add(passwordHash);
      const userId = await insertUser(statements(), {
        username,
        displayName: options.displayName ?? '',
        email: options.email ?? '',
        isSuperUser: options.isSuperUser ?? false,
        approval: options.approval ?? 'approved',
        passwordHash,
        passwordExpiryDays: 365,
        mustChange: options.mustChange ?? false,
      });
      if (options.isLocked) await setLocked(statements(), userId, true);
      if (options.hasExpired) {
        await sql(
          'UPDATE users SET password_expires_at = UTC_TIMESTAMP(6) - INTERVAL 1 SECOND WHERE user_id = ?',
          [userId],
        );
      }
      return { userId, username, password, ust: await openSession(userId) };
    },
    auditOf: (cid) => sql<AuditRow>('SELECT * FROM audit_log WHERE cid = ? ORDER BY audit_id', [cid]),
    isPassword: async (userId, password) =>
      hasher.verify(await storedHash(userId), password.normalize('NFC'), Wait.forMs(PATIENCE_MS)),
    stop: async () => {
      await Promise.all(servers.map((server) => server.stop()));
      await database.close();
      db.destroy();
      await gate?.shut();
      await testDatabase?.drop();
      for (const { lines, stderr } of servers) {
        for (const line of lines) assert.doesNotThrow(() => JSON.parse(line), `no JSON: ${line}`);
        assertNoSecret(lines.join('\n'), secrets, 'the log');
        assertNoSecret(stderr, secrets, 'standard error');
      }
    },
  };
  try {
    await Promise.all(Array.from({ length: count }, () => startServer()));
    await Promise.all(servers.map((server) => server.waitForHealth('SERVING')));
  } catch (error) {
    await Promise.allSettled(servers.map((server) => server.kill()));
    await database.close();
    db.destroy();
    await gate?.shut();
    await testDatabase?.drop();
    throw error;
  }
  return service;
}

// ---- a database that goes away ----------------------------------------------------------------------------------

export interface Gate {
  /** The database's URL, by way of the gate. */
  readonly url: string;
  /** Lets everything through. */
  open(): Promise<void>;
  /** Ends every connection and takes no new ones: what a killed database looks like. */
  shut(): Promise<void>;
  /** Takes connections and passes nothing on in either direction: what a frozen one looks like. */
  stall(): void;
}

/** A TCP proxy in front of a database, on a port that stays the same. */
export async function databaseGate(databaseUrl: string): Promise<Gate> {
  const target = new URL(databaseUrl);
  const pairs = new Set<[Socket, Socket]>();
  let isStalled = false;
  const server = createServer((downstream) => {
    const upstream = createConnection({ host: target.hostname, port: Number(target.port) });
    const pair: [Socket, Socket] = [downstream, upstream];
    pairs.add(pair);
    for (const [from, to] of [pair, [upstream, downstream] as const]) {
      from.on('error', () => {});
      from.on('close', () => {
        to.destroy();
        pairs.delete(pair);
      });
      from.on('data', (bytes) => void to.write(bytes));
      if (isStalled) from.pause();
    }
  });
  const listen = async (port: number) => {
    server.listen(port, '127.0.0.1');
    await once(server, 'listening');
  };
  const shut = async () => {
    for (const [downstream, upstream] of pairs) {
      downstream.destroy();
      upstream.destroy();
    }
    if (server.listening) await new Promise((resolve) => server.close(resolve));
  };
  await listen(0);
  const { port } = server.address() as { port: number };
  const url = new URL(databaseUrl);
  url.host = `127.0.0.1:${port}`;
  return {
    url: url.href,
    open: async () => {
      isStalled = false;
      for (const pair of pairs) for (const socket of pair) socket.resume();
      if (!server.listening) await listen(port);
    },
    shut,
    stall: () => {
      isStalled = true;
      for (const pair of pairs) for (const socket of pair) socket.pause();
    },
  };
}
