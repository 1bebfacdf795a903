import { randomBytes } from 'node:crypto';
import type { Call, Wait } from '../call.ts';
import type { Database, Executor } from './pool.ts';

/** `validated`: all checks passed, and nothing was to be changed. */
export type Outcome = 'ok' | 'validated' | 'refused';

/** What an audit record says beside who called, from where, and when. */
export interface AuditEvent {
  readonly action: string;
  readonly outcome: Outcome;
  /** Why it was refused; empty otherwise. */
  readonly reason: string;
  /** null: an operator at the command line. */
  readonly actorUserId: string | null;
  readonly targetUserId: string | null;
  /** What was asked beyond passwords. */
  readonly request: Readonly<Record<string, string | number | boolean>>;
}

/** Where an audit record stands, and the proof that it is this one. */
export interface AuditReference {
  readonly auditId: number;
  readonly eventId: Buffer;
}

/** The part of a call that is audited. */
export type AuditedCall = Pick<Call, 'cid' | 'app' | 'remoteAddress' | 'peerAddress' | 'claimedAddress'>;

export async function insertAuditRecord(
  db: Executor,
  call: AuditedCall,
  event: AuditEvent,
): Promise<AuditReference> {
  const eventId = randomBytes(16);
  const { insertId } = await db.write(
    `INSERT INTO audit_log (event_id, at, cid, action, outcome, reason, actor_user_id, target_user_id, app, remote_addr,
       peer_addr, claimed_addr, request)
     VALUES (?, UTC_TIMESTAMP(6), ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
    [
      eventId,
      call.cid,
      event.action,
      event.outcome,
      event.reason,
      event.actorUserId,
      event.targetUserId,
      call.app,
      call.remoteAddress,
      call.peerAddress === call.remoteAddress ? null : call.peerAddress,
      call.claimedAddress === undefined || call.claimedAddress === call.remoteAddress
        ? null
        : call.claimedAddress,
      JSON.stringify(event.request),
    ],
  );
  return { auditId: insertId, eventId };
}

/**
 * All of the work, and the audit record that it ends with, or none of it. After a COMMIT without an answer the record
 * tells which.
 */
export async function auditedTransaction<T>(
  database: Database,
  wait: Wait,
  work: (tx: Executor) => Promise<{ outcome: T; record: AuditReference }>,
): Promise<T> {
  const { outcome } = await database.transaction<Awaited<ReturnType<typeof work>>>(wait, {
    work,
    wasCommitted: (tx, { record }) => isRecorded(tx, record),
  });
  return outcome;
}

/**
 * Whether this very record was committed: an AUTO_INCREMENT value alone can be given twice around a crash. Waits for
 * the transaction that wrote it, if that has not ended yet, by the lock on the record.
 */
export async function isRecorded(tx: Executor, { auditId, eventId }: AuditReference): Promise<boolean> {
  const rows = await tx.rows<{ event_id: Buffer }>(
    'SELECT event_id FROM audit_log WHERE audit_id = ? FOR UPDATE',
    [auditId],
  );
  return rows[0]?.event_id.equals(eventId) ?? false;
}

export interface AuditFilter {
  readonly cid?: string;
  /** Acting or target user. */
  readonly userId?: string;
  readonly since?: Date;
  readonly limit: number;
}

/** A record as it is shown; times as ISO 8601 with microseconds. */
export interface AuditRecord extends AuditEvent {
  readonly auditId: number;
  readonly at: string;
  readonly cid: string;
  readonly app: string;
  readonly remoteAddress: string;
  readonly peerAddress: string | null;
  readonly claimedAddress: string | null;
}

/** The newest records that the filter lets through, oldest first. */
export async function listAuditRecords(db: Executor, filter: AuditFilter): Promise<AuditRecord[]> {
  const conditions: [string, (string | Date)[]][] = [];
  if (filter.cid !== undefined) conditions.push(['cid = ?', [filter.cid]]);
  if (filter.userId !== undefined) {
    conditions.push(['(actor_user_id = ? OR target_user_id = ?)', [filter.userId, filter.userId]]);
  }
  if (filter.since !== undefined) conditions.push(['at >= ?', [filter.since]]);
  const where = conditions.length === 0 ? '' : `WHERE ${conditions.map(([sql]) => sql).join(' AND ')}`;
  const rows = await db.rows<{
    audit_id: number;
    at_text: string;
    cid: string;
    action: string;
    outcome: Outcome;
    reason: string;
    actor_user_id: string | null;
    target_user_id: string | null;
    app: string;
    remote_addr: string;
    peer_addr: string | null;
    claimed_addr: string | null;
    request: string | AuditEvent['request'];
  }>(
    `SELECT audit_id, DATE_FORMAT(at, '%Y-%m-%dT%H:%i:%s.%fZ') AS at_text, cid, action, outcome, reason, actor_user_id,
       target_user_id, app, remote_addr, peer_addr, claimed_addr, request
     FROM audit_log ${where} ORDER BY audit_id DESC LIMIT ?`,
    [...conditions.flatMap(([, parameters]) => parameters), String(filter.limit)],
  );
  return rows.reverse().map((row) => ({
    auditId: row.audit_id,
    at: row.at_text,
    cid: row.cid,
    action: row.action,
    outcome: row.outcome,
    reason: row.reason,
    actorUserId: row.actor_user_id,
    targetUserId: row.target_user_id,
    app: row.app,
    remoteAddress: row.remote_addr,
    peerAddress: row.peer_addr,
    claimedAddress: row.claimed_addr,
    // MySQL has a JSON type, MariaDB text with a check.
    request: typeof row.request === 'string' ? JSON.parse(row.request) : row.request,
  }));
}
