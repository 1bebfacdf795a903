import { readdirSync, readFileSync } from 'node:fs';
import mysql, { type Connection, type RowDataPacket } from 'mysql2/promise';
import type { Config } from '../config.ts';
import { connectionOptions } from './pool.ts';

/**
 * Migrations are `migrations/NNNN_name.sql`, statements ended by a semicolon at a line's end. MySQL commits each
 * DDL statement by itself, so every statement must bear being run again (`IF NOT EXISTS`): an interrupted
 * migration is simply run again.
 */
const DIRECTORY = new URL('./migrations/', import.meta.url);
const LOCK_PATIENCE_SECONDS = 120;
const ER_NO_SUCH_TABLE = 1146;

interface Migration {
  readonly version: number;
  readonly name: string;
}

export const migrations: readonly Migration[] = readdirSync(DIRECTORY)
  .filter((file) => /^\d{4}_\w+\.sql$/.test(file))
  .sort()
  .map((name) => ({ version: Number(name.slice(0, 4)), name }));

/** The schema that this program works with. */
export const SCHEMA_VERSION = migrations.at(-1)?.version ?? 0;

/** The schema is not the one that this program works with; the message says what to do. */
export class SchemaMismatch extends Error {
  constructor(actual: number) {
    super(
      actual < SCHEMA_VERSION
        ? `The database has schema version ${actual}, and this rekey needs ${SCHEMA_VERSION}: run "rekey migrate".`
        : `The database has schema version ${actual}, made by a newer rekey; this one knows ${SCHEMA_VERSION}: run the newer rekey.`,
    );
    this.name = 'SchemaMismatch';
  }
}

/** Ends in bounded time, whatever the database does. @throws SchemaMismatch */
export async function checkSchema(config: Pick<Config, 'database' | 'databaseCa'>): Promise<void> {
  const connection = await mysql.createConnection(connectionOptions(config));
  try {
    const actual = await currentVersion(connection, config.database.statement_timeout_ms);
    if (actual !== SCHEMA_VERSION) throw new SchemaMismatch(actual);
  } finally {
    connection.destroy();
  }
}

/**
 * Brings the schema up to date. Replicas that start together wait for one another: a lock of the server, which
 * dies with its connection, lets one through at a time.
 * @throws SchemaMismatch if the schema is newer than this program.
 */
export async function migrate(
  config: Pick<Config, 'database' | 'databaseCa'>,
  report: (line: string) => void,
): Promise<void> {
  const connection = await mysql.createConnection(connectionOptions(config));
  try {
    // The server's locks have one namespace for all databases, and names of at most 64 characters.
    const [[lock]] = await connection.query<RowDataPacket[]>(
      "SELECT GET_LOCK(CONCAT('rekey_migrate_', LEFT(SHA2(DATABASE(), 256), 32)), ?) AS taken",
      [LOCK_PATIENCE_SECONDS],
    );
    if (lock?.taken !== 1) {
      throw new Error(
        `Another rekey has been migrating this database for ${LOCK_PATIENCE_SECONDS} s; try again later`,
      );
    }
    const current = await currentVersion(connection);
    if (current > SCHEMA_VERSION) throw new SchemaMismatch(current);
    await connection.query(
      `CREATE TABLE IF NOT EXISTS schema_migrations (
         version INT UNSIGNED NOT NULL, name VARCHAR(255) NOT NULL, applied_at DATETIME(6) NOT NULL, PRIMARY KEY (version)
       ) ENGINE = InnoDB`,
    );
    for (const migration of migrations.filter(({ version }) => version > current)) {
      report(`Applying ${migration.name}`);
      for (const statement of statementsOf(migration)) await connection.query(statement);
      await connection.query(
        'INSERT INTO schema_migrations (version, name, applied_at) VALUES (?, ?, UTC_TIMESTAMP(6))',
        [migration.version, migration.name],
      );
    }
    report(`Schema version ${SCHEMA_VERSION}: up to date`);
  } finally {
    connection.destroy();
  }
}

async function currentVersion(connection: Connection, timeoutMs?: number): Promise<number> {
  try {
    const sql = 'SELECT MAX(version) AS version FROM schema_migrations';
    const [[row]] = await connection.query<RowDataPacket[]>(
      timeoutMs === undefined ? { sql } : { sql, timeout: timeoutMs },
    );
    return Number(row?.version ?? 0);
  } catch (error) {
    if ((error as { errno?: number }).errno === ER_NO_SUCH_TABLE) return 0;
    throw error;
  }
}

function statementsOf({ name }: Migration): string[] {
  return readFileSync(new URL(name, DIRECTORY), 'utf8')
    .split(/;\s*$/m)
    .map((statement) => statement.replace(/^--.*$/gm, '').trim())
    .filter((statement) => statement !== '');
}
