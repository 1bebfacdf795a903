import assert from 'node:assert/strict';
import { after } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import mysql, { type Connection, type ResultSetHeader, type RowDataPacket } from 'mysql2/promise';
import { Wait } from '../../src/call.ts';
import { type Config, loadConfig } from '../../src/config.ts';
import { migrate } from '../../src/mysql/migrate.ts';
import { Database, type Executor, type Parameter } from '../../src/mysql/pool.ts';
import { insertSession, newToken } from '../../src/mysql/sessions.ts';
import { insertUser, type UserToCreate } from '../../src/mysql/users.ts';
import { createTestDatabase } from '../support/private_database.ts';

const PATIENCE_MS = 30_000;

export const forAWhile = () => Wait.forMs(PATIENCE_MS);

export const configOf = (url: string, settings: Record<string, string> = {}): Config =>
  loadConfig(undefined, { REKEY_APPS: 'CRM', REKEY_DATABASE_URL: url, ...settings });

/** A database of its own, its schema in place, gone when the tests of the file have run. */
export interface TestBed {
  readonly url: string;
  readonly config: Config;
  readonly database: Database;
  /** Single statements of the database under test. */
  readonly db: ReturnType<Database['statements']>;
  /** Reads or writes past the code under test. */
  sql(statement: string, parameters?: readonly Parameter[]): Promise<RowDataPacket[]>;
  /** Another connection past the code under test. */
  connect(): Promise<Connection>;
  /** Another pool, with its own settings; closed with the rest. */
  open(settings: Record<string, string>, url?: string): Database;
  user(fields?: Partial<UserToCreate>): Promise<string>;
  session(userId: string, lifetimeSeconds?: number): Promise<{ token: string; sessionId: number }>;
}

export async function testBed(settings: Record<string, string> = {}): Promise<TestBed> {
  const { url, drop } = await createTestDatabase();
  const config = configOf(url, settings);
  await migrate(config, () => {});
  const databases: Database[] = [];
  const connections: Connection[] = [];
  after(async () => {
    await Promise.all(databases.map((each) => each.close()));
    for (const connection of connections) connection.destroy();
    await drop();
  });
  const connect = async () => {
    const connection = await mysql.createConnection({ uri: url, timezone: 'Z', charset: 'utf8mb4_bin' });
    await connection.query("SET time_zone = '+00:00'");
    // Its server may be told to kill it, which is nothing to end the tests for.
    connection.on('error', () => {});
    connections.push(connection);
    return connection;
  };
  const open = (own: Record<string, string>, through = url) => {
    const database = new Database(configOf(through, { ...settings, ...own }));
    databases.push(database);
    return database;
  };
  const database = open({});
  const db = database.statements(Wait.forMs(600_000));
  const admin = await connect();
  let users = 0;
  return {
    url,
    config,
    database,
    db,
    connect,
    open,
    sql: async (statement, parameters = []) => {
      const [rows] = await admin.query<RowDataPacket[] | ResultSetHeader>(statement, parameters as never[]);
      return Array.isArray(rows) ? rows : [];
    },
    user: (fields) =>
      insertUser(db, {
        username: `user${++users}`,
        displayName: '',
        email: '',
        isSuperUser: false,
        approval: 'approved',
        passwordHash: 'first hash',
        passwordExpiryDays: 0,
        mustChange: false,
        ...fields,
      }),
    session: async (userId, lifetimeSeconds = 3600) => {
      const token = newToken();
      const openedAt = new Date();
      const sessionId = await insertSession(db, {
        token,
        userId,
        app: 'CRM',
        remoteAddress: '192.0.2.1',
        openedAt,
        expiresAt: new Date(openedAt.getTime() + lifetimeSeconds * 1000),
      });
      return { token, sessionId };
    },
  };
}

/** A transaction that must not have to ask whether it was committed. */
export const inTransaction = <T>(database: Database, work: (tx: Executor) => Promise<T>): Promise<T> =>
  database.transaction(forAWhile(), {
    work,
    wasCommitted: async () => assert.fail('COMMIT was answered: nobody needs to ask'),
  });

/** Waits until `look` finds something. */
export async function eventually(what: string, look: () => Promise<boolean>): Promise<void> {
  for (const patience = forAWhile(); !(await look()); await sleep(10)) {
    assert.ok(patience.remainingMs() > 0, `waited in vain: ${what}`);
  }
}

/** Whether `work` is still under way after a pause that it would have ended in, had nothing been in its way. */
export async function isBlocked(work: Promise<unknown>): Promise<boolean> {
  const BLOCKED_AFTER_MS = 150;
  return await Promise.race([
    work.then(
      () => false,
      () => false,
    ),
    sleep(BLOCKED_AFTER_MS, true),
  ]);
}
