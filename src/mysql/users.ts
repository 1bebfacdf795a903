import { randomUUID } from 'node:crypto';
import type { Executor } from './pool.ts';

export type Approval = 'pending' | 'approved' | 'rejected';

/** A person with a password. */
export interface User {
  readonly userId: string;
  readonly username: string;
  readonly displayName: string;
  /** Empty: none. */
  readonly email: string;
  readonly isSuperUser: boolean;
  readonly isLocked: boolean;
  readonly approval: Approval;
  readonly passwordHash: string;
  /** null: never. */
  readonly passwordExpiresAt: Date | null;
  /** By the database's clock, when the row was read. */
  readonly passwordHasExpired: boolean;
  readonly mustChange: boolean;
  /** Old passwords looked at since the last right one, within the window that began so long ago. */
  readonly oldPasswordAttempts: number;
  readonly oldPasswordAttemptsAgeMs: number;
}

export interface UserRow {
  user_id: string;
  username: string;
  display_name: string;
  email: string;
  is_super_user: number;
  is_locked: number;
  approval: Approval;
  password_hash: string;
  password_expires_at: Date | null;
  password_has_expired: number;
  must_change: number;
  old_password_attempts: number;
  old_password_attempts_age_us: number | string | null;
}

/** The columns of a UserRow, of the table with the alias `u`. */
export const USER_COLUMNS = `
  u.user_id, u.username, u.display_name, u.email, u.is_super_user, u.is_locked, u.approval, u.password_hash,
  u.password_expires_at, COALESCE(u.password_expires_at <= UTC_TIMESTAMP(6), 0) AS password_has_expired, u.must_change,
  u.old_password_attempts,
  TIMESTAMPDIFF(MICROSECOND, u.old_password_attempts_since, UTC_TIMESTAMP(6)) AS old_password_attempts_age_us`;

export function toUser(row: UserRow): User {
  return {
    userId: row.user_id,
    username: row.username,
    displayName: row.display_name,
    email: row.email,
    isSuperUser: row.is_super_user === 1,
    isLocked: row.is_locked === 1,
    approval: row.approval,
    passwordHash: row.password_hash,
    passwordExpiresAt: row.password_expires_at,
    passwordHasExpired: Number(row.password_has_expired) === 1,
    mustChange: row.must_change === 1,
    oldPasswordAttempts: row.old_password_attempts,
    oldPasswordAttemptsAgeMs: Number(row.old_password_attempts_age_us ?? 0) / 1000,
  };
}

/**
 * The form in which usernames are stored, looked up and counted for: neither case nor blanks at the end, which SQL
 * passes over in comparisons, tell two people apart.
 */
export const normaliseUsername = (username: string) => username.normalize('NFC').toLowerCase().trimEnd();

export async function findUser(db: Executor, userId: string): Promise<User | undefined> {
  const [row] = await db.rows<UserRow>(`SELECT ${USER_COLUMNS} FROM users u WHERE u.user_id = ?`, [userId]);
  return row && toUser(row);
}

export async function findUserByName(db: Executor, username: string): Promise<User | undefined> {
  const [row] = await db.rows<UserRow>(`SELECT ${USER_COLUMNS} FROM users u WHERE u.username = ?`, [
    normaliseUsername(username),
  ]);
  return row && toUser(row);
}

/**
 * Counts one look at an old password, before it is taken. A window that has passed begins anew.
 * @returns false, with nothing counted, if the limit is reached, or the stored hash is not `expectedHash` any more.
 */
export async function countOldPasswordAttempt(
  db: { writeRepeatably: Executor['write'] },
  userId: string,
  expectedHash: string,
  guard: { limit: number; windowSeconds: number },
): Promise<boolean> {
  // Assignments take effect from left to right: the first one still sees when the old window began.
  const { matched } = await db.writeRepeatably(
    `UPDATE users SET
       old_password_attempts = IF(old_password_attempts_since > UTC_TIMESTAMP(6) - INTERVAL ? SECOND, old_password_attempts + 1, 1),
       old_password_attempts_since = IF(old_password_attempts = 1, UTC_TIMESTAMP(6), old_password_attempts_since)
     WHERE user_id = ? AND password_hash = ? AND (old_password_attempts < ? OR old_password_attempts_since IS NULL
       OR old_password_attempts_since <= UTC_TIMESTAMP(6) - INTERVAL ? SECOND)`,
    [guard.windowSeconds, userId, expectedHash, guard.limit, guard.windowSeconds],
  );
  return matched === 1;
}

/** Forgets the attempts, if the password is still the one that was just proven. */
export async function resetOldPasswordAttempts(
  db: { writeRepeatably: Executor['write'] },
  userId: string,
  provenHash: string,
): Promise<void> {
  await db.writeRepeatably(
    `UPDATE users SET old_password_attempts = 0, old_password_attempts_since = NULL
     WHERE user_id = ? AND password_hash = ?`,
    [userId, provenHash],
  );
}

export interface NewPassword {
  readonly hash: string;
  /** null: never. */
  readonly expiresAt: Date | null;
  readonly mustChange: boolean;
}

const SET_PASSWORD = `u.password_hash = ?, u.password_set_at = UTC_TIMESTAMP(6), u.password_expires_at = ?,
  u.must_change = ?, u.old_password_attempts = 0, u.old_password_attempts_since = NULL`;

/**
 * Sets a password, on condition that the stored hash is still `expectedHash` (null: whatever it is).
 * @returns false if it is another one, or the user is gone.
 */
export async function replacePassword(
  tx: Executor,
  userId: string,
  expectedHash: string | null,
  { hash, expiresAt, mustChange }: NewPassword,
): Promise<boolean> {
  const { matched } = await tx.write(
    `UPDATE users u SET ${SET_PASSWORD} WHERE u.user_id = ? AND u.password_hash = COALESCE(?, u.password_hash)`,
    [hash, expiresAt, mustChange, userId, expectedHash],
  );
  return matched === 1;
}

/**
 * Sets the password of a session's own user and ends the user's other sessions, in one statement, on condition that
 * the session lives, its user may still do this, and the stored hash is still `expectedHash`. The session's row is
 * written to as well, so that nobody can end it before the transaction is over.
 * @returns how many other sessions were ended; undefined, with nothing changed, if a condition does not hold.
 */
export async function replaceOwnPassword(
  tx: Executor,
  sessionId: number,
  expectedHash: string,
  { hash, expiresAt, mustChange }: NewPassword,
  asSuperUser: boolean,
): Promise<number | undefined> {
  const { matched } = await tx.write(
    `UPDATE sessions own
     JOIN users u ON u.user_id = own.user_id
     LEFT JOIN sessions other FORCE INDEX (sessions_user) ON other.user_id = u.user_id AND other.ended_at IS NULL
       AND other.expires_at > UTC_TIMESTAMP(6) AND other.session_id <> own.session_id
     SET ${SET_PASSWORD}, own.ended_at = NULL, other.ended_at = UTC_TIMESTAMP(6)
     WHERE own.session_id = ? AND own.ended_at IS NULL AND own.expires_at > UTC_TIMESTAMP(6)
       AND u.password_hash = ? AND NOT u.is_locked AND u.approval = 'approved' AND (u.is_super_user OR NOT ?)`,
    [hash, expiresAt, mustChange, sessionId, expectedHash, asSuperUser],
  );
  const OWN_SESSION_AND_USER = 2;
  return matched === 0 ? undefined : matched - OWN_SESSION_AND_USER;
}

/** Replaces a hash by a stronger one of the same password. @returns false if the password was changed meanwhile. */
export async function upgradeHash(
  tx: Executor,
  userId: string,
  expectedHash: string,
  hash: string,
): Promise<boolean> {
  const { matched } = await tx.write(
    'UPDATE users SET password_hash = ? WHERE user_id = ? AND password_hash = ?',
    [hash, userId, expectedHash],
  );
  return matched === 1;
}

/**
 * Reads a user as he or she is now, and keeps everybody else from changing that until the transaction ends. Waits
 * for the transactions that are changing it.
 */
export async function lockUser(tx: Executor, userId: string): Promise<{ now: Date; user: User } | undefined> {
  const [row] = await tx.rows<UserRow & { now: Date }>(
    `SELECT UTC_TIMESTAMP(6) AS now, ${USER_COLUMNS} FROM users u WHERE u.user_id = ? FOR UPDATE`,
    [userId],
  );
  return row && { now: row.now, user: toUser(row) };
}

export interface UserToCreate {
  readonly username: string;
  readonly displayName: string;
  readonly email: string;
  readonly isSuperUser: boolean;
  readonly approval: Approval;
  readonly passwordHash: string;
  /** 0: never. */
  readonly passwordExpiryDays: number;
  readonly mustChange: boolean;
}

/** @returns the new user's ID. @throws errno 1062 if the name is taken. */
export async function insertUser(tx: Executor, user: UserToCreate): Promise<string> {
  const userId = randomUUID();
  await tx.write(
    `INSERT INTO users (user_id, username, display_name, email, is_super_user, approval, created_at, password_hash,
       password_set_at, password_expires_at, must_change)
     VALUES (?, ?, ?, ?, ?, ?, UTC_TIMESTAMP(6), ?, UTC_TIMESTAMP(6),
       IF(? = 0, NULL, UTC_TIMESTAMP(6) + INTERVAL ? DAY), ?)`,
    [
      userId,
      normaliseUsername(user.username),
      user.displayName,
      user.email,
      user.isSuperUser,
      user.approval,
      user.passwordHash,
      user.passwordExpiryDays,
      user.passwordExpiryDays,
      user.mustChange,
    ],
  );
  return userId;
}

/** In the order of their names, from the one after `afterUsername`. */
export async function listUsers(db: Executor, afterUsername: string, limit: number): Promise<User[]> {
  const rows = await db.rows<UserRow>(
    `SELECT ${USER_COLUMNS} FROM users u WHERE u.username > ? ORDER BY u.username LIMIT ?`,
    [afterUsername, String(limit)],
  );
  return rows.map(toUser);
}

/** @returns false if there is no such user. */
export async function setLocked(tx: Executor, userId: string, isLocked: boolean): Promise<boolean> {
  return (
    (await tx.write('UPDATE users SET is_locked = ? WHERE user_id = ?', [isLocked, userId])).matched === 1
  );
}

/** @returns false if there is no such user. */
export async function setApproval(tx: Executor, userId: string, approval: Approval): Promise<boolean> {
  return (
    (await tx.write('UPDATE users SET approval = ? WHERE user_id = ?', [approval, userId])).matched === 1
  );
}

/** @returns false if there is no such user. */
export async function setSuperUser(tx: Executor, userId: string, isSuperUser: boolean): Promise<boolean> {
  return (
    (await tx.write('UPDATE users SET is_super_user = ? WHERE user_id = ?', [isSuperUser, userId]))
      .matched === 1
  );
}
