/**
 * The truth, kept by the database itself: triggers write down each change of a hash, each successful audit record,
 * and each loss of a right, in the same transaction as the thing itself and in the order in which rows were locked.
 */
import type { Connection, RowDataPacket } from 'mysql2/promise';
import { type Action, describe, type Operation } from './register.ts';

export interface LedgerEntry {
  readonly kind: 'hash' | 'audit' | 'session-ended' | 'demoted' | 'promoted' | 'locked' | 'unlocked';
  /** A user's ID; of `session-ended` the token's SHA-256 in hexadecimal. */
  readonly subject: string;
  /** Of `audit` the cid. */
  readonly detail: string;
}

const TRIGGERS = [
  `CREATE TRIGGER fault_users AFTER UPDATE ON users FOR EACH ROW BEGIN
     IF OLD.password_hash <> NEW.password_hash THEN
       INSERT INTO fault_ledger (kind, subject) VALUES ('hash', NEW.user_id);
     END IF;
     IF OLD.is_super_user <> NEW.is_super_user THEN
       INSERT INTO fault_ledger (kind, subject) VALUES (IF(NEW.is_super_user, 'promoted', 'demoted'), NEW.user_id);
     END IF;
     IF OLD.is_locked <> NEW.is_locked THEN
       INSERT INTO fault_ledger (kind, subject) VALUES (IF(NEW.is_locked, 'locked', 'unlocked'), NEW.user_id);
     END IF;
   END`,
  `CREATE TRIGGER fault_sessions AFTER UPDATE ON sessions FOR EACH ROW BEGIN
     IF OLD.ended_at IS NULL AND NEW.ended_at IS NOT NULL THEN
       INSERT INTO fault_ledger (kind, subject) VALUES ('session-ended', LOWER(HEX(NEW.token_hash)));
     END IF;
   END`,
  `CREATE TRIGGER fault_audit AFTER INSERT ON audit_log FOR EACH ROW BEGIN
     IF NEW.action = 'ChangePassword' AND NEW.outcome = 'ok' THEN
       INSERT INTO fault_ledger (kind, subject, detail) VALUES ('audit', NEW.target_user_id, NEW.cid);
     END IF;
   END`,
];

export async function createLedger(db: Connection): Promise<void> {
  await db.query(
    `CREATE TABLE fault_ledger (
       seq BIGINT UNSIGNED NOT NULL AUTO_INCREMENT, kind VARCHAR(16) NOT NULL, subject VARCHAR(128) NOT NULL,
       detail VARCHAR(128) NOT NULL DEFAULT '', PRIMARY KEY (seq)
     ) ENGINE = InnoDB CHARACTER SET ascii COLLATE ascii_bin`,
  );
  for (const trigger of TRIGGERS) await db.query(trigger);
}

export async function readLedger(db: Connection): Promise<LedgerEntry[]> {
  const [rows] = await db.query<RowDataPacket[]>(
    'SELECT kind, subject, detail FROM fault_ledger ORDER BY seq',
  );
  return rows as LedgerEntry[];
}

/** A change that a client tried, and through what authority. */
export interface AttemptedChange extends Operation {
  readonly userId: string;
  /** Each attempt's cid begins with this. */
  readonly id: string;
  /** SHA-256 of the session token, in hexadecimal; undefined where the password itself is the authority. */
  readonly session: string | undefined;
  readonly actorUserId: string;
  readonly byOther: boolean;
}

export interface Finding {
  readonly userId: string;
  readonly what: string;
  readonly evidence: readonly string[];
}

/** The operation that an attempt's cid belongs to. */
export const operationOf = (cid: string) => cid.slice(0, cid.lastIndexOf('.'));

/**
 * Compares what the clients were told with what was done: each change of a hash has its one audit record and the
 * other way round; an acknowledged change is there exactly once, a refused one never; each change begins from the
 * password that the one before left; nothing was done through a right that was lost by then.
 * @returns the password that each user must have in the end, and whatever is wrong.
 */
export function checkLedger(
  ledger: readonly LedgerEntry[],
  changes: readonly AttemptedChange[],
  initial: ReadonlyMap<string, string>,
): { final: Map<string, string>; findings: Finding[] } {
  const findings: Finding[] = [];
  const byId = new Map(changes.map((change) => [change.id, change]));
  const final = new Map(initial);
  const recorded = new Map<string, number>();
  const unrecorded = new Map<string, number>();
  const lastCalled = new Map<string, AttemptedChange>();
  const ended = new Set<string>();
  const powerless = new Set<string>();
  const lockedOut = new Set<string>();
  const trail = new Map<string, string[]>();
  const find = (userId: string, what: string, ...about: (AttemptedChange | undefined)[]) =>
    findings.push({
      userId,
      what,
      evidence: [
        ...about.filter((change) => change !== undefined).map(describe),
        ...(trail.get(userId) ?? []).slice(-8),
      ],
    });

  for (const { kind, subject, detail } of ledger) {
    if (!['session-ended', 'promoted', 'demoted'].includes(kind)) {
      const lines = trail.get(subject) ?? [];
      trail.set(subject, [...lines.slice(-20), `ledger: ${kind} ${detail}`]);
    }
    switch (kind) {
      case 'session-ended':
        ended.add(subject);
        break;
      case 'demoted':
        powerless.add(subject);
        break;
      case 'promoted':
        powerless.delete(subject);
        break;
      case 'locked':
        lockedOut.add(subject);
        break;
      case 'unlocked':
        lockedOut.delete(subject);
        break;
      case 'hash': {
        const open = (unrecorded.get(subject) ?? 0) + 1;
        unrecorded.set(subject, open);
        if (open > 1) find(subject, 'the hash changed without an audit record');
        break;
      }
      case 'audit': {
        const change = byId.get(operationOf(detail));
        const open = (unrecorded.get(subject) ?? 0) - 1;
        unrecorded.set(subject, Math.max(0, open));
        if (open < 0) find(subject, 'an audit record tells of a change that was not made', change);
        if (!change) {
          find(subject, `an audit record of a change that nobody asked for: ${detail}`);
          break;
        }
        const times = (recorded.get(change.id) ?? 0) + 1;
        recorded.set(change.id, times);
        if (times > 1) find(subject, 'one change was made more than once', change);
        checkChain(find, final, lastCalled, change);
        const { session, actorUserId, byOther } = change;
        if (session !== undefined && ended.has(session))
          find(subject, 'a change through a session that had ended', change);
        if (byOther && powerless.has(actorUserId))
          find(
            subject,
            "a change of somebody else's password by a user who was no super-user any more",
            change,
          );
        if (lockedOut.has(actorUserId)) find(subject, 'a change by a user who was locked by then', change);
        break;
      }
    }
  }
  for (const [userId, open] of unrecorded)
    if (open > 0) find(userId, 'the hash changed without an audit record');
  for (const change of changes) {
    const times = recorded.get(change.id) ?? 0;
    if (change.outcome === 'ok' && times === 0)
      find(change.userId, 'an acknowledged change is not there', change);
    if ((change.outcome === 'refused' || change.outcome === 'wrong') && times > 0)
      find(change.userId, 'a change that was refused was made', change);
  }
  return { final, findings };
}

function checkChain(
  find: (userId: string, what: string, ...about: (AttemptedChange | undefined)[]) => void,
  final: Map<string, string>,
  lastCalled: Map<string, AttemptedChange>,
  change: AttemptedChange,
): void {
  const { userId } = change;
  const action: Action = change.action;
  if (action.kind === 'verify') return;
  if (action.kind === 'change' && final.get(userId) !== action.from)
    find(userId, 'a change from a password that was not the current one', change);
  final.set(userId, action.to);
  const latest = lastCalled.get(userId);
  if (change.outcome === 'ok' && latest && change.returned < latest.called)
    find(userId, 'a change took effect after one that was asked for later', change, latest);
  if (!latest || change.called > latest.called) lastCalled.set(userId, change);
}
