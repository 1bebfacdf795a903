import { createHmac, timingSafeEqual } from 'node:crypto';
import type { Call } from '../call.ts';
import { type AuditEvent, auditedTransaction, insertAuditRecord } from '../mysql/audit.ts';
import { type Earlier, findOutcome, recordOutcome } from '../mysql/idempotency.ts';
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

const DAY_MS = 86_400_000;

/** A request, and whose session and password it is about. */
interface Change {
  readonly session: Session;
  readonly request: ChangeRequest;
  readonly targetUserId: string;
  readonly isOwn: boolean;
  readonly event: Omit<AuditEvent, 'outcome' | 'reason'>;
}

/**
 * Changes a password, or says why not: the decision table of `user_service.proto`, from top to bottom.
 * @throws Refusal
 */
export async function changePassword(
  deps: ChangePasswordDependencies,
  call: Call,
  request: ChangeRequest,
): Promise<ChangeOutcome> {
  const { app, peerAddress, ust, wait } = call;
  // Row 14 before all others, and so without an audit record: who cannot be served costs the database nothing.
  // Whose session it is only the database knows; one person's flood comes through one session, or a few.
  const applicant = { path: [app, peerAddress, ust], wait, hashes: hashesOf(request) };
  return await deps.hasher.slots.admit(applicant, () => changeAdmitted(deps, call, request));
}

async function changeAdmitted(
  deps: ChangePasswordDependencies,
  call: Call,
  request: ChangeRequest,
): Promise<ChangeOutcome> {
  const statements = deps.database.statements(call.wait);
  const session = requireSession(await findSession(statements, call.ust, call.idempotencyKey));
  const actorUserId = session.user.userId;
  const targetUserId = request.userId ?? actorUserId;
  Object.assign(call.learnt, { actorUserId, targetUserId });

  const event = { action: 'ChangePassword', actorUserId, targetUserId, request: auditedPart(request) };
  const change = { session, request, targetUserId, isOwn: targetUserId === actorUserId, event };
  return await auditRefusals(deps.database, call, event, () =>
    orOutcomeOfTwin(deps, call, change, () => checkAndChange(deps, call, change)),
  );
}

const hashesOf = ({ oldPassword, validateOnly }: ChangeRequest) =>
  (oldPassword === undefined ? 0 : 1) + (validateOnly ? 0 : 1);

async function checkAndChange(
  deps: ChangePasswordDependencies,
  call: Call,
  change: Change,
): Promise<ChangeOutcome> {
  const { session, request, targetUserId, isOwn } = change;
  requireApp(call.app, deps.settings().apps);
  requireGoodStanding(session.user);
  requireRights(change);
  const target = isOwn ? session.user : await findTarget(deps, call, targetUserId);
  const earlier = findEarlier(call, change, session.earlier);
  if (earlier) return earlier;

  const newPassword = normalise(request.newPassword);
  const oldPassword = request.oldPassword === undefined ? undefined : normalise(request.oldPassword);
  if (isOwn || oldPassword !== undefined) requireAttemptsLeft(target, deps.settings().guard);
  deps.policy().check(newPassword, { ...target, oldPassword });
  if (isOwn && oldPassword === undefined) throw oldPasswordMissing();

  const applicant = {
    path: [call.app, call.peerAddress, session.user.userId],
    wait: call.wait,
    hashes: hashesOf(request),
  };
  const newHash = await deps.hasher.slots.run(applicant, async () => {
    if (oldPassword !== undefined) await verifyOldPassword(deps, call, target, oldPassword);
    return request.validateOnly ? undefined : await deps.hasher.hash(newPassword, call.wait);
  });

  const verifiedHash = oldPassword === undefined ? null : target.passwordHash;
  return newHash === undefined
    ? await recordValidated(deps, call, change, verifiedHash)
    : await store(deps, call, change, verifiedHash, newHash);
}

const needsSuperUser = ({ request, isOwn }: Change) =>
  !isOwn || request.passwordExpiry !== undefined || request.mustChange !== undefined;

/** Rows 5 and 6: decided before anybody is looked up, so that nobody learns who exists. */
function requireRights(change: Change): void {
  const { user } = change.session;
  if (needsSuperUser(change) && !user.isSuperUser)
    throw new Refusal('SUPER_USER_REQUIRED', { subStatus: ['E005001'] });
  if (!change.isOwn && isChangeDue(user)) {
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

function requireAttemptsLeft(target: User, guard: ChangeSettings['guard']): void {
  const windowIsOpen = target.oldPasswordAttemptsAgeMs < guard.windowSeconds * 1000;
  if (windowIsOpen && target.oldPasswordAttempts >= guard.limit) throw tooManyAttempts(target, guard);
}

const tooManyAttempts = (target: User, guard: ChangeSettings['guard']) =>
  new Refusal('TOO_MANY_ATTEMPTS', {
    retryAfterMs: Math.max(1000, Math.ceil(guard.windowSeconds * 1000 - target.oldPasswordAttemptsAgeMs)),
  });

const oldPasswordMissing = () =>
  new Refusal('INVALID_REQUEST', {
    violations: [required('old_password', 'is required to change the own password')],
    subStatus: ['E008003'],
  });

/** Rows 8 and 11. The attempt is counted before the look is taken, so that nothing can outrun or undo the count. */
async function verifyOldPassword(
  { database, hasher, settings }: ChangePasswordDependencies,
  call: Call,
  target: User,
  oldPassword: string,
): Promise<void> {
  const { guard } = settings();
  const statements = database.statements(call.wait);
  if (!(await countOldPasswordAttempt(statements, target.userId, target.passwordHash, guard))) {
    const now = await findUser(statements, target.userId);
    if (now?.passwordHash !== target.passwordHash) throw new Refusal('CONCURRENT_CHANGE');
    throw tooManyAttempts(now, guard);
  }
  if (!(await hasher.verify(target.passwordHash, oldPassword, call.wait)))
    throw new Refusal('OLD_PASSWORD_MISMATCH', { subStatus: ['E005001'] });
}

/** The first outcome, if this very request was carried out before under its idempotency key. */
function findEarlier(call: Call, change: Change, earlier: Earlier | undefined): ChangeOutcome | undefined {
  if (!earlier || change.request.validateOnly) return undefined;
  if (!timingSafeEqual(earlier.requestMac, requestMac(call, change))) {
    throw new Refusal('IDEMPOTENCY_KEY_REUSED', { subStatus: ['E008002'] });
  }
  call.learnt.replayed = true;
  return { passwordExpiresAt: earlier.passwordExpiresAt, sessionsEnded: earlier.sessionsEnded };
}

/** Where another change came first, that may have been this very request, sent twice: then its outcome is the answer. */
async function orOutcomeOfTwin(
  { database }: ChangePasswordDependencies,
  call: Call,
  change: Change,
  work: () => Promise<ChangeOutcome>,
): Promise<ChangeOutcome> {
  try {
    return await work();
  } catch (error) {
    const cameSecond =
      error instanceof Refusal &&
      (error.reason === 'CONCURRENT_CHANGE' || error.reason === 'OLD_PASSWORD_MISMATCH');
    if (!cameSecond || call.idempotencyKey === undefined) throw error;
    const statements = database.statements(call.wait);
    const outcome = findEarlier(
      call,
      change,
      await findOutcome(statements, change.session.user.userId, call.idempotencyKey),
    );
    if (!outcome) throw error;
    return outcome;
  }
}

/**
 * Tells two requests apart without keeping anything that passwords could be guessed against: the key of the MAC
 * is the session token, 256 random bits of which the database has no more than a hash.
 */
function requestMac(call: Call, { request, targetUserId }: Change): Buffer {
  const { oldPassword, newPassword, passwordExpiry, mustChange } = request;
  const parts = [targetUserId, oldPassword ?? null, newPassword, passwordExpiry ?? null, mustChange ?? null];
  return createHmac('sha256', call.ust).update(JSON.stringify(parts)).digest();
}

function auditedPart({ passwordExpiry, mustChange, validateOnly }: ChangeRequest): AuditEvent['request'] {
  return {
    ...(passwordExpiry === undefined ? {} : { password_expiry: passwordExpiry }),
    ...(mustChange === undefined ? {} : { must_change: mustChange }),
    ...(validateOnly ? { validate_only: true } : {}),
  };
}

/** When the new password will expire, by the database's clock; null: never. */
function expiryOf({ request, session }: Change, settings: ChangeSettings): Date | null {
  const days = request.passwordExpiry ?? settings.expiryDays;
  return days === 0 ? null : new Date(session.now.getTime() + days * DAY_MS);
}

/**
 * The change and all that goes with it, in one transaction, on condition that nothing it rests on has changed: the
 * session, the rights, and the hash that the old password was verified against (null: none was sent).
 */
async function store(
  deps: ChangePasswordDependencies,
  call: Call,
  change: Change,
  verifiedHash: string | null,
  newHash: string,
): Promise<ChangeOutcome> {
  const { session, request, targetUserId, isOwn, event } = change;
  const settings = deps.settings();
  const mustChange = request.mustChange ?? (settings.mustChangeAfterSuperUser && !isOwn);
  const passwordExpiresAt = expiryOf(change, settings);
  const password = { hash: newHash, expiresAt: passwordExpiresAt, mustChange };

  return await auditedTransaction(deps.database, call.wait, async (tx) => {
    const sessionsEnded =
      isOwn && verifiedHash !== null
        ? await replaceOwnPassword(tx, session.sessionId, verifiedHash, password, needsSuperUser(change))
        : await replaceAnothersPassword(tx, session.sessionId, targetUserId, verifiedHash, password);
    if (sessionsEnded === undefined) throw new Refusal('CONCURRENT_CHANGE');

    if (call.idempotencyKey !== undefined) {
      const earlier = { requestMac: requestMac(call, change), passwordExpiresAt, sessionsEnded };
      const isFirst = await recordOutcome(tx, session.user.userId, call.idempotencyKey, earlier);
      if (!isFirst) throw new Refusal('CONCURRENT_CHANGE');
    }
    const record = await insertAuditRecord(tx, call, { ...event, outcome: 'ok', reason: '' });
    return { outcome: { passwordExpiresAt, sessionsEnded }, record };
  });
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
  change: Change,
  verifiedHash: string | null,
): Promise<ChangeOutcome> {
  const { session, targetUserId, isOwn, event } = change;
  const statements = database.statements(call.wait);
  if (verifiedHash !== null) await resetOldPasswordAttempts(statements, targetUserId, verifiedHash);
  const sessionsEnded = await countOtherSessions(
    statements,
    targetUserId,
    isOwn ? session.sessionId : undefined,
  );
  await insertAuditRecord(statements, call, { ...event, outcome: 'validated', reason: '' });
  return { passwordExpiresAt: expiryOf(change, settings()), sessionsEnded };
}
