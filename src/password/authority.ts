import { type Call, Wait } from '../call.ts';
import { type AuditEvent, auditedTransaction, insertAuditRecord } from '../mysql/audit.ts';
import type { Database } from '../mysql/pool.ts';
import type { Session } from '../mysql/sessions.ts';
import type { User } from '../mysql/users.ts';
import { Refusal } from './errors.ts';

/** Who may do anything at all: what every method asks before its own questions. */

export function requireSession(session: Session | undefined): Session {
  if (!session) throw new Refusal('SESSION_INVALID', { subStatus: ['E007001'] });
  return session;
}

export function requireApp(app: string, apps: ReadonlySet<string>): void {
  if (!apps.has(app)) throw new Refusal('APP_NOT_ALLOWED', { subStatus: ['E004001'] });
}

export function requireGoodStanding(user: Pick<User, 'isLocked' | 'approval'>): void {
  if (user.isLocked) throw new Refusal('USER_LOCKED', { subStatus: ['E005002'] });
  if (user.approval !== 'approved') {
    throw new Refusal('USER_NOT_APPROVED', {
      subStatus: [user.approval === 'pending' ? 'E005003' : 'E005004'],
    });
  }
}

/** The password has expired or must be changed: the session is good for changing it, and for logging out. */
export const isChangeDue = (user: Pick<User, 'mustChange' | 'passwordHasExpired'>) =>
  user.mustChange || user.passwordHasExpired;

/** The codes that earlier clients know for a password that is due. */
export const changeDueSubStatus = (user: Pick<User, 'passwordHasExpired'>) => [
  user.passwordHasExpired ? 'E003004' : 'E003007',
];

/**
 * Runs `work` and writes an audit record for every refusal of it, but for those that the database or the caller
 * is not there to hear of: they are in the log.
 */
export async function auditRefusals<T>(
  database: Database,
  call: Call,
  event: Omit<AuditEvent, 'outcome' | 'reason'>,
  work: () => Promise<T>,
): Promise<T> {
  try {
    return await work();
  } catch (error) {
    if (error instanceof Refusal && !NOT_AUDITED.has(error.reason)) {
      const record: AuditEvent = { ...event, outcome: 'refused', reason: error.reason };
      // Whoever guesses wrong and hangs up at once is recorded all the same.
      await call.wait.timed('database', () =>
        auditedTransaction(database, Wait.forMs(RECORD_MS), async (tx) => ({
          outcome: undefined,
          record: await insertAuditRecord(tx, call, record),
        })),
      );
    }
    throw error;
  }
}

const RECORD_MS = 5_000;

const NOT_AUDITED = new Set(['UNAVAILABLE', 'DEADLINE_EXCEEDED', 'CANCELLED']);
