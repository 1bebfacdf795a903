import { createHash } from 'node:crypto';
import type { Executor } from './pool.ts';

/** Whom or what failed log-ins are counted for. */
export interface Subject {
  readonly kind: 'account' | 'address';
  readonly name: string;
}

const subjectHash = ({ kind, name }: Subject) => createHash('sha256').update(`${kind}\0${name}`).digest();

/**
 * Counts one log-in before it is looked at. A window begins with the first and never moves, so that it opens by
 * itself however many more are counted. Counted again when a lost connection repeats it: never too few.
 * @returns how many there have been in this window, this one included: its own number, whoever else counts meanwhile.
 */
export async function countLoginAttempt(
  db: { writeRepeatably: Executor['write'] },
  subject: Subject,
  windowSeconds: number,
): Promise<number> {
  // Assignments take effect from left to right: the first one still sees when the old window began.
  const { matched, insertId } = await db.writeRepeatably(
    `INSERT INTO login_attempts (subject, attempts, since) VALUES (?, 1, UTC_TIMESTAMP(6))
     ON DUPLICATE KEY UPDATE
       attempts = LAST_INSERT_ID(IF(since > UTC_TIMESTAMP(6) - INTERVAL ? SECOND, attempts + 1, 1)),
       since = IF(attempts = 1, UTC_TIMESTAMP(6), since)`,
    [subjectHash(subject), windowSeconds],
  );
  // An inserted row counts as one, an updated one as two: https://dev.mysql.com/doc/refman/9.7/en/insert-on-duplicate.html
  return matched === 1 ? 1 : insertId;
}

/** How long ago the window of this subject began, in milliseconds. */
export async function loginWindowAgeMs(db: Executor, subject: Subject): Promise<number> {
  const [row] = await db.rows<{ age_us: number | string }>(
    'SELECT TIMESTAMPDIFF(MICROSECOND, since, UTC_TIMESTAMP(6)) AS age_us FROM login_attempts WHERE subject = ?',
    [subjectHash(subject)],
  );
  return Number(row?.age_us ?? 0) / 1000;
}

/** After a right password: the account starts afresh, and the address has one failure less than was counted. */
export async function forgiveLoginAttempts(
  db: { writeRepeatably: Executor['write'] },
  account: Subject,
  address: Subject,
): Promise<void> {
  await db.writeRepeatably(
    'UPDATE login_attempts SET attempts = IF(subject = ? OR attempts < 1, 0, attempts - 1) WHERE subject IN (?, ?)',
    [subjectHash(account), subjectHash(account), subjectHash(address)],
  );
}
