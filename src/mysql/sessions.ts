import { createHash, randomBytes } from 'node:crypto';
import { type Earlier, IDEMPOTENCY_COLUMNS, type IdempotencyRow, toEarlier } from './idempotency.ts';
import type { Executor } from './pool.ts';
import { toUser, USER_COLUMNS, type User, type UserRow } from './users.ts';

const TOKEN_BYTES = 32;

/** A session token (UST): 256 random bits as base64url. It is shown once and stored as its SHA-256 only. */
export const newToken = () => randomBytes(TOKEN_BYTES).toString('base64url');

const tokenHash = (token: string) => createHash('sha256').update(token).digest();

/** A session that has neither expired nor been ended, and whose it is. */
export interface Session {
  /** The database's clock, when the session was looked up. */
  readonly now: Date;
  readonly sessionId: number;
  readonly expiresAt: Date;
  readonly user: User;
  /** What was done under the idempotency key that was asked for. */
  readonly earlier: Earlier | undefined;
}

interface SessionRow extends UserRow, IdempotencyRow {
  now: Date;
  session_id: number;
  expires_at: Date;
}

/** The live session of this token, its user, and what that user did under this idempotency key, in one look. */
export async function findSession(
  db: Executor,
  token: string,
  idempotencyKey: string | undefined,
): Promise<Session | undefined> {
  const [row] = await db.rows<SessionRow>(
    `SELECT UTC_TIMESTAMP(6) AS now, s.session_id, s.expires_at, ${USER_COLUMNS}, ${IDEMPOTENCY_COLUMNS}
     FROM sessions s
     JOIN users u ON u.user_id = s.user_id
     LEFT JOIN idempotency_records i ON i.user_id = s.user_id AND i.idempotency_key = ?
     WHERE s.token_hash = ? AND s.ended_at IS NULL AND s.expires_at > UTC_TIMESTAMP(6)`,
    [idempotencyKey ?? null, tokenHash(token)],
  );
  return (
    row && {
      now: row.now,
      sessionId: row.session_id,
      expiresAt: row.expires_at,
      user: toUser(row),
      earlier: toEarlier(row),
    }
  );
}

/** What a session is still good for, read within the transaction that relies on it. */
export type Authority = Pick<
  User,
  'isSuperUser' | 'isLocked' | 'approval' | 'passwordHasExpired' | 'mustChange'
>;

/**
 * Reads a session's user and keeps both as they are until the transaction ends: nobody ends the session, and
 * nobody locks or demotes the user. The locks are shared, so that one super-user's changes need not wait for
 * each other.
 * @returns undefined if the session is over.
 */
export async function lockAuthority(tx: Executor, sessionId: number): Promise<Authority | undefined> {
  const [row] = await tx.rows<UserRow>(
    `SELECT ${USER_COLUMNS} FROM sessions s JOIN users u ON u.user_id = s.user_id
     WHERE s.session_id = ? AND s.ended_at IS NULL AND s.expires_at > UTC_TIMESTAMP(6) LOCK IN SHARE MODE`,
    [sessionId],
  );
  return row && toUser(row);
}

/** Ends all live sessions of a user. @returns how many. */
export async function endSessions(tx: Executor, userId: string): Promise<number> {
  const { matched } = await tx.write(
    `UPDATE sessions FORCE INDEX (sessions_user) SET ended_at = UTC_TIMESTAMP(6)
     WHERE user_id = ? AND ended_at IS NULL AND expires_at > UTC_TIMESTAMP(6)`,
    [userId],
  );
  return matched;
}

/** How many live sessions a user has beside one (undefined: in all). */
export async function countOtherSessions(
  db: Executor,
  userId: string,
  except: number | undefined,
): Promise<number> {
  const [row] = await db.rows<{ sessions: number | string }>(
    `SELECT COUNT(*) AS sessions FROM sessions
     WHERE user_id = ? AND ended_at IS NULL AND expires_at > UTC_TIMESTAMP(6) AND session_id <> ?`,
    [userId, except ?? 0],
  );
  return Number(row?.sessions ?? 0);
}

/** @returns false if it is over already, or there is none. */
export async function endSession(tx: Executor, sessionId: number): Promise<boolean> {
  const { matched } = await tx.write(
    `UPDATE sessions SET ended_at = UTC_TIMESTAMP(6)
     WHERE session_id = ? AND ended_at IS NULL AND expires_at > UTC_TIMESTAMP(6)`,
    [sessionId],
  );
  return matched === 1;
}

export interface NewSession {
  readonly token: string;
  readonly userId: string;
  readonly app: string;
  readonly remoteAddress: string;
  readonly openedAt: Date;
  readonly expiresAt: Date;
}

/** @returns the session's ID. */
export async function insertSession(tx: Executor, session: NewSession): Promise<number> {
  const { insertId } = await tx.write(
    'INSERT INTO sessions (token_hash, user_id, app, remote_addr, opened_at, expires_at) VALUES (?, ?, ?, ?, ?, ?)',
    [
      tokenHash(session.token),
      session.userId,
      session.app,
      session.remoteAddress,
      session.openedAt,
      session.expiresAt,
    ],
  );
  return insertId;
}

export interface ListedSession {
  readonly sessionId: number;
  readonly userId: string;
  readonly username: string;
  readonly app: string;
  readonly remoteAddress: string;
  readonly openedAt: Date;
  readonly expiresAt: Date;
}

/** Live sessions, newest first; of one user, or of all. */
export async function listSessions(
  db: Executor,
  userId: string | undefined,
  limit: number,
): Promise<ListedSession[]> {
  const rows = await db.rows<{
    session_id: number;
    user_id: string;
    username: string;
    app: string;
    remote_addr: string;
    opened_at: Date;
    expires_at: Date;
  }>(
    `SELECT s.session_id, s.user_id, u.username, s.app, s.remote_addr, s.opened_at, s.expires_at
     FROM sessions s JOIN users u ON u.user_id = s.user_id
     WHERE s.ended_at IS NULL AND s.expires_at > UTC_TIMESTAMP(6) ${userId === undefined ? '' : 'AND s.user_id = ?'}
     ORDER BY s.session_id DESC LIMIT ?`,
    [...(userId === undefined ? [] : [userId]), String(limit)],
  );
  return rows.map((row) => ({
    sessionId: row.session_id,
    userId: row.user_id,
    username: row.username,
    app: row.app,
    remoteAddress: row.remote_addr,
    openedAt: row.opened_at,
    expiresAt: row.expires_at,
  }));
}

/** The owner of a session, live or not. */
export async function findSessionOwner(db: Executor, sessionId: number): Promise<string | undefined> {
  const [row] = await db.rows<{ user_id: string }>('SELECT user_id FROM sessions WHERE session_id = ?', [
    sessionId,
  ]);
  return row?.user_id;
}
