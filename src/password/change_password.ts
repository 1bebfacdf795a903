import { createHmac, timingSafeEqual } from 'node:crypto';
import type { Call } from '../call.ts';
import { type AuditEvent, type AuditReference, insertAuditRecord, isRecorded } from '../mysql/audit.ts';
import { recordOutcome } from '../mysql/idempotency.ts';
import type { Database, Executor } from '../mysql/pool.ts';
import {
  countOtherSessions,
  endSessions,
  findSession,
  lockAuthority,
  type Session,
} from '../mysql/sessions.ts';
import {
  countOldPasswordAttempt,
  findUser,
  lockUser,
  type NewPassword,
  replaceOwnPassword,
  replacePassword,
  resetOldPasswordAttempts,
  type User,
} from '../mysql/users.ts';
import {
  auditRefusals,
  changeDueSubStatus,
  isChangeDue,
  requireApp,
  requireGoodStanding,
  requireSession,
} from './authority.ts';
import { Refusal } from './errors.ts';
import type { Hasher } from './hasher.ts';
import { normalise, type Policy, required } from './policy.ts';

export interface ChangeRequest {
  readonly oldPassword: string | undefined;
  readonly newPassword: string;
  readonly userId: string | undefined;
  /** Days; 1 to 36500. */
  readonly passwordExpiry: number | undefined;
  readonly mustChange: boolean | undefined;
  readonly validateOnly: boolean;
}

export interface ChangeOutcome {
  /** null: never. */
  readonly passwordExpiresAt: Date | null;
  readonly sessionsEnded: number;
}

export interface ChangeSettings {
  readonly apps: ReadonlySet<string>;
  /** Days until a new password expires; 0: never. */
  readonly expiryDays: number;
  readonly mustChangeAfterSuperUser: boolean;
  readonly guard: { readonly limit: number; readonly windowSeconds: number };
}

export interface ChangePasswordDependencies {
  readonly database: Database;
  readonly hasher: Hasher;
  /** As they are configured now: both may be reloaded between two calls. */
  policy(): Policy;
  settings(): ChangeSettings;
}

const ACTION = 'ChangePassword';
const DAY_MS = 86_400_000;

/**
 * Changes a password, or says why not: the decision table of `user_service.proto`, from top to bottom.
 * @throws Refusal
 */
export async function changePassword(
  deps: ChangePasswordDependencies,
  call: Call,
  request: ChangeRequest,
): Promise<ChangeOutcome> {
  const statements = deps.database.statements(call.wait);
  const session = requireSession(await findSession(statements, call.ust, call.idempotencyKey));
  const targetUserId = request.userId ?? session.user.userId;
  const isOwn = targetUserId === session.user.userId;
  Object.assign(call.learnt, { actorUserId: session.user.userId, targetUserId });
  const event = {
    action: ACTION,
    actorUserId: session.user.userId,
    targetUserId,
    request: auditedPart(request),
  };

  return await auditRefusals(deps.database, call, event, async () => {
    requireApp(call.app, deps.settings().apps);
    requireGoodStanding(session.user);
    requireRights(session.user, request, isOwn);
    const target = isOwn ? session.user : await findTarget(deps, call, targetUserId);
    const earlier = findEarlier(session, call, request, targetUserId);
    if (earlier) return earlier;

    const { guard } = deps.settings();
    if (request.oldPassword !== undefined) requireAttemptsLeft(target, guard);
    const newPassword = normalise(request.newPassword);
    const oldPassword = request.oldPassword === undefined ? undefined : normalise(request.oldPassword);
    deps.policy().check(newPassword, { ...target, oldPassword });
    if (isOwn && oldPassword === undefined) {
      throw new Refusal('INVALID_REQUEST', {
        violations: [required('old_password', 'is required to change the own password')],
      });
    }

    const verify = async (password: string) => {
      if (!(await countOldPasswordAttempt(statements, target.userId, guard)))
        throw tooManyAttempts(target, guard);
      if (!(await deps.hasher.verify(target.passwordHash, password, call.wait)))
        throw new Refusal('OLD_PASSWORD_MISMATCH');
    };
    const applicant = {
      path: [call.app, call.peerAddress, session.user.userId],
      wait: call.wait,
      hashes: (oldPassword === undefined ? 0 : 1) + (request.validateOnly ? 0 : 1),
    };
    const newHash = await deps.hasher.slots.run(applicant, async () => {
      if (oldPassword !== undefined) await verify(oldPassword);
      return request.validateOnly ? undefined : await deps.hasher.hash(newPassword, call.wait);
    });

    const verifiedHash = oldPassword === undefined ? null : target.passwordHash;
    const change = { event, session, isOwn, targetUserId, verifiedHash, request };
    return newHash === undefined
      ? await recordValidated(deps, call, change)
      : await store(deps, call, { ...change, newHash });
  });
}

const needsSuperUser = (request: ChangeRequest, isOwn: boolean) =>
  !isOwn || request.passwordExpiry !== undefined || request.mustChange !== undefined;

/** Rows 5 and 6: decided before anybody is looked up, so that nobody learns who exists. */
function requireRights(user: User, request: ChangeRequest, isOwn: boolean): void {
  if (needsSuperUser(request, isOwn) && !user.isSuperUser)
    throw new Refusal('SUPER_USER_REQUIRED', { subStatus: ['E005001'] });
  if (!isOwn && isChangeDue(user)) {
    throw new Refusal('OWN_PASSWORD_CHANGE_REQUIRED', { subStatus: changeDueSubStatus(user) });
  }
}

async function findTarget(
  { database }: ChangePasswordDependencies,
  call: Call,
  userId: string,
): Promise<User> {
  const target = await findUser(database.statements(call.wait), userId);
  if (!target) throw new Refusal('USER_NOT_FOUND', { subStatus: ['E008002'] });
  return target;
}

/** The first outcome, if this very request was carried out before under its idempotency key. */
function findEarlier(
  session: Session,
  call: Call,
  request: ChangeRequest,
  targetUserId: string,
): ChangeOutcome | undefined {
  if (!session.earlier || request.validateOnly) return undefined;
  if (!timingSafeEqual(session.earlier.requestMac, requestMac(call, request, targetUserId))) {
    throw new Refusal('IDEMPOTENCY_KEY_REUSED', { subStatus: ['E008002'] });
  }
  call.learnt.replayed = true;
  const { passwordExpiresAt, sessionsEnded } = session.earlier;
  return { passwordExpiresAt, sessionsEnded };
}

/**
 * Tells two requests apart without keeping anything that passwords could be guessed against: the key of the MAC
 * is the session token, 256 random bits of which the database has no more than a hash.
 */
function requestMac(call: Call, request: ChangeRequest, targetUserId: string): Buffer {
  const { oldPassword, newPassword, passwordExpiry, mustChange } = request;
  const parts = [targetUserId, oldPassword ?? null, newPassword, passwordExpiry ?? null, mustChange ?? null];
  return createHmac('sha256', call.ust).update(JSON.stringify(parts)).digest();
}

function requireAttemptsLeft(target: User, guard: ChangeSettings['guard']): void {
  const windowIsOpen = target.oldPasswordAttemptsAgeMs < guard.windowSeconds * 1000;
  if (windowIsOpen && target.oldPasswordAttempts >= guard.limit) throw tooManyAttempts(target, guard);
}

const tooManyAttempts = (target: User, guard: ChangeSettings['guard']) =>
  new Refusal('TOO_MANY_ATTEMPTS', {
    retryAfterMs: Math.max(1000, Math.ceil(guard.windowSeconds * 1000 - target.oldPasswordAttemptsAgeMs)),
  });

function auditedPart({ passwordExpiry, mustChange, validateOnly }: ChangeRequest): AuditEvent['request'] {
  return {
    ...(passwordExpiry === undefined ? {} : { password_expiry: passwordExpiry }),
    ...(mustChange === undefined ? {} : { must_change: mustChange }),
    ...(validateOnly ? { validate_only: true } : {}),
  };
}

/** When the password will expire that is set now. */
function expiryAt(now: Date, request: ChangeRequest, settings: ChangeSettings): Date | null {
  const days = request.passwordExpiry ?? settings.expiryDays;
  return days === 0 ? null : new Date(now.getTime() + days * DAY_MS);
}

/** A change that has passed every check. */
interface CheckedChange {
  readonly event: Omit<AuditEvent, 'outcome' | 'reason'>;
  readonly session: Session;
  readonly isOwn: boolean;
  readonly targetUserId: string;
  /** The stored hash that the old password was verified against; null: none was sent. */
  readonly verifiedHash: string | null;
  readonly request: ChangeRequest;
}

/** The change and all that goes with it, in one transaction, on condition that nothing it rests on has changed. */
async function store(
  deps: ChangePasswordDependencies,
  call: Call,
  {
    event,
    session,
    isOwn,
    targetUserId,
    verifiedHash,
    request,
    newHash,
  }: CheckedChange & { newHash: string },
): Promise<ChangeOutcome> {
  const settings = deps.settings();
  const actorUserId = session.user.userId;
  const mustChange = request.mustChange ?? (settings.mustChangeAfterSuperUser && !isOwn);
  const expiresAt = expiryAt(session.now, request, settings);
  const password = { hash: newHash, expiresAt, mustChange };
  const work = async (tx: Executor): Promise<{ outcome: ChangeOutcome; record: AuditReference }> => {
    const sessionsEnded =
      isOwn && verifiedHash !== null
        ? await replaceOwnPassword(
            tx,
            session.sessionId,
            verifiedHash,
            password,
            needsSuperUser(request, isOwn),
          )
        : await replaceAnothersPassword(tx, session.sessionId, targetUserId, verifiedHash, password);
    if (sessionsEnded === undefined) throw new Refusal('CONCURRENT_CHANGE');

    if (call.idempotencyKey !== undefined) {
      const earlier = {
        requestMac: requestMac(call, request, targetUserId),
        passwordExpiresAt: expiresAt,
        sessionsEnded,
      };
      const isFirst = await recordOutcome(tx, actorUserId, call.idempotencyKey, earlier);
      if (!isFirst) throw new Refusal('CONCURRENT_CHANGE');
    }
    const record = await insertAuditRecord(tx, call, { ...event, outcome: 'ok', reason: '' });
    return { outcome: { passwordExpiresAt: expiresAt, sessionsEnded }, record };
  };
  const wasCommitted = async (tx: Executor, { record }: Awaited<ReturnType<typeof work>>) => {
    await lockUser(tx, targetUserId);
    return await isRecorded(tx, record);
  };
  try {
    const { outcome } = await deps.database.transaction(call.wait, { work, wasCommitted });
    return outcome;
  } catch (error) {
    if (
      !(error instanceof Refusal) ||
      error.reason !== 'CONCURRENT_CHANGE' ||
      call.idempotencyKey === undefined
    )
      throw error;
    // What came first may have been this very request, sent twice.
    const now = await findSession(deps.database.statements(call.wait), call.ust, call.idempotencyKey);
    const earlier = now && findEarlier(now, call, request, targetUserId);
    if (!earlier) throw error;
    return earlier;
  }
}

/** As `replaceOwnPassword`, for somebody else's: all of that person's sessions end. */
async function replaceAnothersPassword(
  tx: Executor,
  sessionId: number,
  targetUserId: string,
  expectedHash: string | null,
  password: NewPassword,
): Promise<number | undefined> {
  const authority = await lockAuthority(tx, sessionId);
  const isEntitled =
    authority?.isSuperUser &&
    !authority.isLocked &&
    authority.approval === 'approved' &&
    !isChangeDue(authority);
  if (!isEntitled || !(await replacePassword(tx, targetUserId, expectedHash, password))) return undefined;
  return await endSessions(tx, targetUserId);
}

/** The answer to validate_only: what would be done, and nothing done but the record of it. */
async function recordValidated(
  { database, settings }: ChangePasswordDependencies,
  call: Call,
  { event, session, isOwn, targetUserId, verifiedHash, request }: CheckedChange,
): Promise<ChangeOutcome> {
  const statements = database.statements(call.wait);
  if (verifiedHash !== null) await resetOldPasswordAttempts(statements, targetUserId, verifiedHash);
  const sessionsEnded = await countOtherSessions(
    statements,
    targetUserId,
    isOwn ? session.sessionId : undefined,
  );
  await insertAuditRecord(statements, call, { ...event, outcome: 'validated', reason: '' });
  return { passwordExpiresAt: expiryAt(session.now, request, settings()), sessionsEnded };
}
