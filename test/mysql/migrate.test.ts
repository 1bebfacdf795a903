import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { after, describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import mysql, { type Connection, type RowDataPacket } from 'mysql2/promise';
import { checkSchema, migrate, migrations, SCHEMA_VERSION, SchemaMismatch } from '../../src/mysql/migrate.ts';
import { createTestDatabase } from '../support/private_database.ts';
import { configOf } from './test_bed.ts';

const drops: (() => Promise<void>)[] = [];
after(async () => {
  for (const drop of drops) await drop();
});

async function emptyDatabase() {
  const { url, drop } = await createTestDatabase();
  const admin = await mysql.createConnection({ uri: url });
  drops.push(async () => {
    admin.destroy();
    await drop();
  });
  return { url, admin, config: configOf(url) };
}

/** Every table as the server would create it. */
async function schemaOf(admin: Connection): Promise<Record<string, string>> {
  const [tables] = await admin.query<RowDataPacket[]>('SHOW TABLES');
  const schema: Record<string, string> = {};
  for (const name of tables.map((row) => String(Object.values(row)[0]))) {
    const [[row]] = await admin.query<RowDataPacket[]>(`SHOW CREATE TABLE ${name}`);
    schema[name] = String(row?.['Create Table']).replace(/ AUTO_INCREMENT=\d+/, '');
  }
  return schema;
}

async function versions(admin: Connection): Promise<number[]> {
  const [rows] = await admin.query<RowDataPacket[]>('SELECT version FROM schema_migrations ORDER BY version');
  return rows.map(({ version }) => version);
}

const all = migrations.map(({ version }) => version);
const fresh = await emptyDatabase();
await migrate(fresh.config, () => {});
const wanted = await schemaOf(fresh.admin);

test('migrations are numbered without a gap', () => {
  assert.deepEqual(
    all,
    all.map((_, index) => index + 1),
  );
  assert.equal(SCHEMA_VERSION, all.length);
});

test('an empty database gets every table, and the check passes', async () => {
  for (const table of ['users', 'sessions', 'audit_log', 'idempotency_records', 'login_attempts']) {
    assert.ok(wanted[table], table);
  }
  assert.deepEqual(await versions(fresh.admin), all);
  await checkSchema(fresh.config);
});

test('every table is transactional, and every time is kept to the microsecond', () => {
  for (const [name, sql] of Object.entries(wanted)) {
    assert.match(sql, /ENGINE=InnoDB/, name);
    assert.doesNotMatch(sql, / (datetime|timestamp)(?!\(6\))/i, name);
  }
});

test('a second run changes nothing and says so', async () => {
  const { admin, config } = await emptyDatabase();
  const reports: string[][] = [[], []];
  for (const lines of reports) await migrate(config, (line) => lines.push(line));
  assert.deepEqual(reports[0], [
    ...migrations.map(({ name }) => `Applying ${name}`),
    `Schema version ${SCHEMA_VERSION}: up to date`,
  ]);
  assert.deepEqual(reports[1], [`Schema version ${SCHEMA_VERSION}: up to date`]);
  assert.deepEqual(await versions(admin), all);
});

test('five processes that migrate at the same time get it done once, and all of them succeed', async () => {
  const { url, admin } = await emptyDatabase();
  const main = fileURLToPath(new URL('../../src/main.ts', import.meta.url));
  const env = { ...process.env, REKEY_APPS: 'CRM', REKEY_DATABASE_URL: url };
  const results = await Promise.all(
    Array.from({ length: 5 }, () => promisify(execFile)(process.execPath, [main, 'migrate'], { env })),
  );
  const applied = results.filter(({ stderr }) => stderr.includes('Applying'));
  assert.equal(applied.length, 1, results.map(({ stderr }) => stderr).join('---\n'));
  for (const { stderr } of results) assert.match(stderr, /up to date/);
  assert.deepEqual(await versions(admin), all);
  assert.deepEqual(await schemaOf(admin), wanted);
});

describe('an interrupted migration', () => {
  const statements = migrations.flatMap(({ name }) =>
    readFileSync(new URL(`../../src/mysql/migrations/${name}`, import.meta.url), 'utf8')
      .replace(/^--.*$/gm, '')
      .split(/;\s*$/m)
      .filter((statement) => statement.trim() !== ''),
  );
  for (const done of [1, Math.ceil(statements.length / 2), statements.length]) {
    test(`after statement ${done} of ${statements.length} is finished by the next run`, async () => {
      const { admin, config } = await emptyDatabase();
      for (const statement of statements.slice(0, done)) await admin.query(statement);
      await assert.rejects(checkSchema(config), SchemaMismatch);
      await migrate(config, () => {});
      assert.deepEqual(await schemaOf(admin), wanted);
      await checkSchema(config);
    });
  }
});

describe('another schema', () => {
  test('an older one is refused with a sentence that says what to do', async () => {
    const { config } = await emptyDatabase();
    await assert.rejects(checkSchema(config), {
      name: 'SchemaMismatch',
      message: `The database has schema version 0, and this rekey needs ${SCHEMA_VERSION}: run "rekey migrate".`,
    });
  });

  test('a newer one is refused with a sentence that says what to do, and left alone', async () => {
    const { admin, config } = await emptyDatabase();
    await migrate(config, () => {});
    const newer = SCHEMA_VERSION + 7;
    await admin.query('INSERT INTO schema_migrations VALUES (?, ?, UTC_TIMESTAMP(6))', [newer, 'newer.sql']);
    const message = `The database has schema version ${newer}, made by a newer rekey; this one knows ${SCHEMA_VERSION}: run the newer rekey.`;
    await assert.rejects(checkSchema(config), { name: 'SchemaMismatch', message });
    await assert.rejects(
      migrate(config, () => {}),
      { name: 'SchemaMismatch', message },
    );
    assert.deepEqual(await versions(admin), [...all, newer]);
  });

  test('a database that is not there is an error and no mismatch', async () => {
    const url = new URL(fresh.url);
    url.pathname = '/rekey_no_such_database';
    await assert.rejects(checkSchema(configOf(url.href)), { code: 'ER_BAD_DB_ERROR' });
  });
});
