import type { Executor } from './pool.ts';

/** The first outcome of a change that carried an idempotency key. */
export interface Earlier {
  readonly requestMac: Buffer;
  /** null: never. */
  readonly passwordExpiresAt: Date | null;
  readonly sessionsEnded: number;
}

export interface IdempotencyRow {
  earlier_mac: Buffer | null;
  earlier_expires_at: Date | null;
  earlier_sessions_ended: number | null;
}

/** The columns of an IdempotencyRow, of the table with the alias `i`. */
export const IDEMPOTENCY_COLUMNS = `i.request_mac AS earlier_mac, i.password_expires_at AS earlier_expires_at,
  i.sessions_ended AS earlier_sessions_ended`;

export function toEarlier(row: IdempotencyRow): Earlier | undefined {
  if (row.earlier_mac === null) return undefined;
  return {
    requestMac: row.earlier_mac,
    passwordExpiresAt: row.earlier_expires_at,
    sessionsEnded: row.earlier_sessions_ended ?? 0,
  };
}

/** What this user did under this key, whatever has become of the session since. */
export async function findOutcome(db: Executor, userId: string, key: string): Promise<Earlier | undefined> {
  const [row] = await db.rows<IdempotencyRow>(
    `SELECT ${IDEMPOTENCY_COLUMNS} FROM idempotency_records i WHERE i.user_id = ? AND i.idempotency_key = ?`,
    [userId, key],
  );
  return row && toEarlier(row);
}

const ER_DUP_ENTRY = 1062;

/** @returns false if this user has used the key before. */
export async function recordOutcome(
  tx: Executor,
  userId: string,
  key: string,
  outcome: Earlier,
): Promise<boolean> {
  try {
    await tx.write(
      `INSERT INTO idempotency_records (user_id, idempotency_key, request_mac, password_expires_at, sessions_ended, created_at)
       VALUES (?, ?, ?, ?, ?, UTC_TIMESTAMP(6))`,
      [userId, key, outcome.requestMac, outcome.passwordExpiresAt, outcome.sessionsEnded],
    );
    return true;
  } catch (error) {
    if ((error as { errno?: number }).errno === ER_DUP_ENTRY) return false;
    throw error;
  }
}
