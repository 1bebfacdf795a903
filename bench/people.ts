/** The made-up people of the benchmark: what the load client knows of them, and how they get into the database. */
import { createHash } from 'node:crypto';
import mysql, { type Connection } from 'mysql2/promise';

export const APP = 'CRM';

const WORDS = 'harbour tulip quartz violin meadow glacier pepper anchor lantern walnut copper saddle'.split(
  ' ',
);

/** What people choose, more or less: all pass the policy, at its various costs. Everybody begins with the first. */
export const PASSWORDS: readonly string[] = Array.from({ length: 64 }, (_, index) => {
  const digest = createHash('sha256').update(`password ${index}`).digest();
  const word = (at: number) => WORDS[(digest[at] as number) % WORDS.length] as string;
  const styles = [
    `${word(0)}-${word(1)}-${digest[2]}-${word(3)}`,
    `${word(0)} ${word(1)} ${word(2)} ${word(3)} ${word(4)}`,
    digest.toString('base64url').slice(0, 16),
    `${word(0).toUpperCase()}${digest.readUInt16BE(1)}!${word(3)}${digest[4]}`,
  ];
  return styles[index % styles.length] as string;
});

/** A password that the policy refuses. */
export const WEAK_PASSWORD = 'Sommer2024';

const sha256 = (text: string) => createHash('sha256').update(text).digest('hex');

/** The session token of person `n`; they are numbered from 0. */
export const tokenOf = (n: number) => sha256(`session-0-${n}`);

export interface Population {
  readonly users: number;
  /** Of each user: sessions, one of them live, and as many audit records. */
  readonly sessionsEach: number;
}

type Progress = (line: string) => void;

/** Rows by one INSERT … SELECT: as many as five digits can tell apart. */
const ROWS_AT_ONCE = 100_000;

/** `FROM` what yields a column `n`, from 0 to ROWS_AT_ONCE - 1. */
const NUMBERS = `(SELECT a.d + 10 * b.d + 100 * c.d + 1000 * e.d + 10000 * f.d AS n
  FROM digits a, digits b, digits c, digits e, digits f) numbers`;

/** A random-looking UUID made of a number. */
const uuidOf = (n: string) =>
  `LOWER(INSERT(INSERT(INSERT(INSERT(LEFT(SHA2(CONCAT('user-', ${n}), 256), 32), 9, 0, '-'), 14, 0, '-'), 19, 0, '-'), 24, 0, '-'))`;

/** Fills a migrated database. The rows have the sizes and the indexes the disorder of real ones. */
export async function populate(
  databaseUrl: string,
  { users, sessionsEach }: Population,
  passwordHash: string,
  progress: Progress,
): Promise<void> {
  const db = await bulkConnection(databaseUrl);
  await inSteps(db, 'users', users, progress, (from) => [
    `INSERT INTO users (user_id, username, display_name, email, created_at, password_hash, password_set_at, password_expires_at)
     SELECT ${uuidOf(from)}, CONCAT('person-', ${from}), CONCAT('Person ', ${from}), CONCAT('person-', ${from}, '@example.com'),
       UTC_TIMESTAMP(6), ?, UTC_TIMESTAMP(6), UTC_TIMESTAMP(6) + INTERVAL 700 DAY`,
    passwordHash,
  ]);
  // The first session of each is live, the others are over and not old enough to be removed.
  await inSteps(db, 'sessions', users * sessionsEach, progress, (n) => [
    `INSERT INTO sessions (token_hash, user_id, app, remote_addr, opened_at, expires_at, ended_at)
     SELECT UNHEX(SHA2(SHA2(CONCAT('session-', ${n} DIV ${users}, '-', ${n} MOD ${users}), 256), 256)),
       ${uuidOf(`${n} MOD ${users}`)}, '${APP}', '192.0.2.7', UTC_TIMESTAMP(6) - INTERVAL 20 DAY,
       UTC_TIMESTAMP(6) + INTERVAL IF(${n} < ${users}, 300, -19) DAY, NULL`,
  ]);
  await inSteps(db, 'audit records', users * sessionsEach, progress, (n) => [
    `INSERT INTO audit_log (event_id, at, cid, action, outcome, reason, actor_user_id, target_user_id, app, remote_addr, request)
     SELECT UNHEX(LEFT(SHA2(CONCAT('event-', ${n}), 256), 32)), UTC_TIMESTAMP(6) - INTERVAL ${users * sessionsEach} - ${n} SECOND,
       CONCAT('bench-', LEFT(SHA2(CONCAT('cid-', ${n}), 256), 24)), 'ChangePassword', 'ok', '', ${uuidOf(`${n} MOD ${users}`)},
       ${uuidOf(`${n} MOD ${users}`)}, '${APP}', '192.0.2.7', '{}'`,
  ]);
  await db.query('DROP TABLE digits');
  await db.query('ANALYZE TABLE users, sessions, audit_log');
  await db.end();
}

/** The same people for better-auth, whose tables are there already. */
export async function populatePeer(
  databaseUrl: string,
  { users, sessionsEach }: Population,
  passwordHash: string,
  progress: Progress,
): Promise<void> {
  const db = await bulkConnection(databaseUrl);
  await inSteps(db, 'users of the peer', users, progress, (n) => [
    `INSERT INTO \`user\` (id, name, email, emailVerified, createdAt, updatedAt)
     SELECT ${uuidOf(n)}, CONCAT('Person ', ${n}), CONCAT('person-', ${n}, '@example.com'), TRUE, UTC_TIMESTAMP(), UTC_TIMESTAMP()`,
  ]);
  await inSteps(db, 'accounts of the peer', users, progress, (n) => [
    `INSERT INTO account (id, accountId, providerId, userId, password, createdAt, updatedAt)
     SELECT ${uuidOf(`CONCAT('account-', ${n})`)}, ${uuidOf(n)}, 'credential', ${uuidOf(n)}, ?, UTC_TIMESTAMP(), UTC_TIMESTAMP()`,
    passwordHash,
  ]);
  await inSteps(db, 'sessions of the peer', users * sessionsEach, progress, (n) => [
    `INSERT INTO session (id, token, userId, expiresAt, createdAt, updatedAt, ipAddress, userAgent)
     SELECT ${uuidOf(`CONCAT('session-', ${n})`)}, SHA2(CONCAT('session-', ${n} DIV ${users}, '-', ${n} MOD ${users}), 256),
       ${uuidOf(`${n} MOD ${users}`)}, UTC_TIMESTAMP() + INTERVAL IF(${n} < ${users}, 7, -1) DAY, UTC_TIMESTAMP(), UTC_TIMESTAMP(),
       '192.0.2.7', ''`,
  ]);
  await db.query('DROP TABLE digits');
  await db.end();
}

async function bulkConnection(databaseUrl: string): Promise<Connection> {
  const db = await mysql.createConnection({ uri: databaseUrl, timezone: 'Z' });
  await db.query('CREATE TABLE digits (d INT PRIMARY KEY)');
  await db.query('INSERT INTO digits VALUES (0), (1), (2), (3), (4), (5), (6), (7), (8), (9)');
  await db.query(
    "SET SESSION sql_log_bin = 0, SESSION time_zone = '+00:00', SESSION unique_checks = 0, SESSION foreign_key_checks = 0",
  );
  return db;
}

/** Runs `INSERT … SELECT` for as many numbers as there are rows to be, some at a time. */
async function inSteps(
  db: Connection,
  what: string,
  rows: number,
  progress: Progress,
  insert: (n: string) => [sql: string, ...parameters: string[]],
): Promise<void> {
  const [sql, ...parameters] = insert('(n + @from_n)');
  for (let from = 0; from < rows; from += ROWS_AT_ONCE) {
    await db.query('SET @from_n = ?', [from]);
    const count = Math.min(ROWS_AT_ONCE, rows - from);
    await db.query(`${sql} FROM ${NUMBERS} WHERE n < ${count} ORDER BY n`, parameters);
    if (rows >= 10 * ROWS_AT_ONCE)
      progress(`${what}: ${(from + count).toLocaleString('en')} of ${rows.toLocaleString('en')}`);
  }
}
