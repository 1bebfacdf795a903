import { setTimeout as sleep } from 'node:timers/promises';
import type { Executor } from './pool.ts';

/** How long things are kept after they have lost their use. */
export interface Retention {
  readonly sessionDays: number;
  readonly idempotencyHours: number;
  readonly loginAttemptSeconds: number;
  /** 0: for ever. */
  readonly auditDays: number;
}

/** Few enough rows that their locks are gone before a call could notice. */
const BATCH = 200;
const PAUSE_MS = 50;

/** Removes what is past its retention, a small batch at a time. @returns how many rows of each kind. */
export async function removeExpired(
  db: Executor,
  retention: Retention,
  signal: AbortSignal,
): Promise<Record<'sessions' | 'idempotency' | 'loginAttempts' | 'audit', number>> {
  const inBatches = async (sql: string, age: number) => {
    for (let removed = 0; ; ) {
      const { matched } = await db.write(`${sql} LIMIT ${BATCH}`, [age]);
      removed += matched;
      if (matched < BATCH || signal.aborted) return removed;
      await sleep(PAUSE_MS);
    }
  };
  return {
    sessions: await inBatches(
      'DELETE FROM sessions WHERE expires_at < UTC_TIMESTAMP(6) - INTERVAL ? DAY ORDER BY expires_at',
      retention.sessionDays,
    ),
    idempotency: await inBatches(
      'DELETE FROM idempotency_records WHERE created_at < UTC_TIMESTAMP(6) - INTERVAL ? HOUR ORDER BY created_at',
      retention.idempotencyHours,
    ),
    loginAttempts: await inBatches(
      'DELETE FROM login_attempts WHERE since < UTC_TIMESTAMP(6) - INTERVAL ? SECOND ORDER BY since',
      retention.loginAttemptSeconds,
    ),
    audit:
      retention.auditDays === 0
        ? 0
        : await inBatches(
            'DELETE FROM audit_log WHERE at < UTC_TIMESTAMP(6) - INTERVAL ? DAY ORDER BY at',
            retention.auditDays,
          ),
  };
}
