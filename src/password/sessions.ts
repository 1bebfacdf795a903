import { isIP } from 'node:net';
import type { Call } from '../call.ts';
import { auditedTransaction, insertAuditRecord } from '../mysql/audit.ts';
import {
  countLoginAttempt,
  forgiveLoginAttempts,
  loginWindowAgeMs,
  type Subject,
} from '../mysql/login_attempts.ts';
import type { Database } from '../mysql/pool.ts';
import {
  endSession,
  endSessions,
  findSession,
  insertSession,
  newToken,
  type Session,
} from '../mysql/sessions.ts';
import {
  findUserByName,
  lockUser,
  normaliseUsername,
  replacePassword,
  type User,
  upgradeHash,
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
import { normalise, type Policy } from './policy.ts';
import type { Applicant } from './slots.ts';

const DAY_MS = 86_400_000;
/** Of an IPv6 address, of 16 bits each. */
const GROUPS = 8;

export interface LoginSettings {
  readonly apps: ReadonlySet<string>;
  readonly lifetimeSeconds: number;
  /** Days until a new password expires; 0: never. */
  readonly expiryDays: number;
  /** Days before its expiry from which on a password is about to expire. */
  readonly expiryWarningDays: number;
  readonly guard: {
    readonly perAccount: number;
    readonly perAddress: number;
    readonly windowSeconds: number;
  };
}

export interface SessionDependencies {
  readonly database: Database;
  readonly hasher: Hasher;
  /** As they are configured now: both may be reloaded between two calls. */
  policy(): Policy;
  settings(): LoginSettings;
}

export interface LoginRequest {
  readonly username: string;
  readonly password: string;
  readonly newPassword: string | undefined;
}

export interface LoginOutcome {
  readonly ust: string;
  readonly sessionExpiresAt: Date;
  readonly userId: string;
  /** null: never. */
  readonly passwordExpiresAt: Date | null;
  readonly passwordAboutToExpire: boolean;
}

/**
 * Opens a session for somebody who knows the password, and replaces the password where that is due or asked for.
 * Until the password has proven right, everybody gets one and the same answer, after the same work.
 * @throws Refusal
 */
export async function logIn(
  deps: SessionDependencies,
  call: Call,
  request: LoginRequest,
): Promise<LoginOutcome> {
  requireApp(call.app, deps.settings().apps);
  const applicant = {
    path: [call.app, call.peerAddress, normaliseUsername(request.username)],
    wait: call.wait,
    hashes: request.newPassword === undefined ? 1 : 2,
  };
  // Before anything is counted: who cannot be served costs the database nothing, and nobody an attempt.
  return await deps.hasher.slots.admit(applicant, () => logInAdmitted(deps, call, request, applicant));
}

async function logInAdmitted(
  deps: SessionDependencies,
  call: Call,
  request: LoginRequest,
  applicant: Applicant,
): Promise<LoginOutcome> {
  const settings = deps.settings();
  const username = normaliseUsername(request.username);
  const password = normalise(request.password);
  const newPassword = request.newPassword === undefined ? undefined : normalise(request.newPassword);
  const account: Subject = { kind: 'account', name: username };
  const address: Subject = { kind: 'address', name: networkOf(call.remoteAddress) };
  const statements = deps.database.statements(call.wait);

  // The address comes first: who has used up that one can't use up the accounts of others.
  await guardLogin(statements, address, settings.guard.perAddress, settings.guard.windowSeconds);
  await guardLogin(statements, account, settings.guard.perAccount, settings.guard.windowSeconds);

  const user = await findUserByName(statements, username);
  const storedHash = user?.passwordHash ?? (await deps.hasher.nobodysHash());
  const proven = await deps.hasher.slots.run(applicant, async () => {
    const isRight = await deps.hasher.verify(storedHash, password, call.wait);
    if (!user || !isRight) throw new Refusal('CREDENTIALS_INVALID', { subStatus: ['E005001'] });
    Object.assign(call.learnt, { actorUserId: user.userId, targetUserId: user.userId });
    await forgiveLoginAttempts(statements, account, address);
    const event = { action: 'Login', actorUserId: user.userId, targetUserId: user.userId, request: {} };
    return await auditRefusals(deps.database, call, event, async () => {
      requireGoodStanding(user);
      if (newPassword === undefined) {
        requireNoChangeDue(user);
        const rehashed = deps.hasher.needsRehash(storedHash)
          ? await deps.hasher.hash(password, call.wait)
          : undefined;
        return { user, newHash: undefined, rehashed };
      }
      deps.policy().check(newPassword, { ...user, oldPassword: password });
      return { user, newHash: await deps.hasher.hash(newPassword, call.wait), rehashed: undefined };
    });
  });
  return await openSession(deps, call, settings, proven);
}

/** One person has a whole /64 of IPv6 addresses, and would have as many log-ins as that. */
function networkOf(address: string): string {
  if (isIP(address) !== 6) return address;
  const [head = [], tail] = address
    .split('::')
    .map((part) => part.split(':').filter((group) => group !== ''));
  const zeros = tail === undefined ? 0 : GROUPS - head.length - tail.length;
  return [...head, ...Array<string>(zeros).fill('0'), ...(tail ?? [])].slice(0, GROUPS / 2).join(':');
}

async function guardLogin(
  statements: ReturnType<Database['statements']>,
  subject: Subject,
  limit: number,
  windowSeconds: number,
): Promise<void> {
  if ((await countLoginAttempt(statements, subject, windowSeconds)) <= limit) return;
  const ageMs = await loginWindowAgeMs(statements, subject);
  throw new Refusal('TOO_MANY_ATTEMPTS', {
    retryAfterMs: Math.max(1000, Math.ceil(windowSeconds * 1000 - ageMs)),
  });
}

function requireNoChangeDue(user: User): void {
  if (isChangeDue(user))
    throw new Refusal('PASSWORD_CHANGE_REQUIRED', { subStatus: changeDueSubStatus(user) });
}

/** A password that was right, and the hash to be stored: of another password, or a stronger one of the same. */
interface Proven {
  readonly user: User;
  readonly newHash: string | undefined;
  readonly rehashed: string | undefined;
}

/** The session and all that goes with it, in one transaction, on condition that nothing it rests on has changed. */
async function openSession(
  { database }: SessionDependencies,
  call: Call,
  settings: LoginSettings,
  { user, newHash, rehashed }: Proven,
): Promise<LoginOutcome> {
  const { userId } = user;
  const event = { outcome: 'ok' as const, reason: '', actorUserId: userId, targetUserId: userId };
  return await auditedTransaction(database, call.wait, async (tx) => {
    const locked = await lockUser(tx, userId);
    if (!locked || !isStillWelcome(locked.user, user, newHash !== undefined))
      throw new Refusal('CONCURRENT_CHANGE');
    const { now } = locked;

    let passwordExpiresAt = locked.user.passwordExpiresAt;
    if (newHash !== undefined) {
      passwordExpiresAt =
        settings.expiryDays === 0 ? null : new Date(now.getTime() + settings.expiryDays * DAY_MS);
      const password = { hash: newHash, expiresAt: passwordExpiresAt, mustChange: false };
      await replacePassword(tx, userId, user.passwordHash, password);
      await endSessions(tx, userId);
      await insertAuditRecord(tx, call, { ...event, action: 'ChangePassword', request: { at_login: true } });
    } else if (rehashed !== undefined) await upgradeHash(tx, userId, user.passwordHash, rehashed);

    const ust = newToken();
    const sessionExpiresAt = new Date(now.getTime() + settings.lifetimeSeconds * 1000);
    await insertSession(tx, {
      token: ust,
      userId,
      app: call.app,
      remoteAddress: call.remoteAddress,
      openedAt: now,
      expiresAt: sessionExpiresAt,
    });
    const request: Record<string, boolean> = rehashed === undefined ? {} : { rehashed: true };
    const record = await insertAuditRecord(tx, call, { ...event, action: 'Login', request });
    const warnFrom = now.getTime() + settings.expiryWarningDays * DAY_MS;
    const passwordAboutToExpire = passwordExpiresAt !== null && passwordExpiresAt.getTime() <= warnFrom;
    return { outcome: { ust, sessionExpiresAt, userId, passwordExpiresAt, passwordAboutToExpire }, record };
  });
}

/** Whether what was true when the password was verified is true now. */
function isStillWelcome(now: User, then: User, setsPassword: boolean): boolean {
  if (now.passwordHash !== then.passwordHash || now.isLocked || now.approval !== 'approved') return false;
  return setsPassword || !isChangeDue(now);
}

/** Ends the session that the call came with. @throws Refusal */
export async function logOut({ database, settings }: SessionDependencies, call: Call): Promise<void> {
  const session = requireSession(await findSession(database.statements(call.wait), call.ust, undefined));
  const { userId } = session.user;
  Object.assign(call.learnt, { actorUserId: userId, targetUserId: userId });
  const event = { action: 'Logout', actorUserId: userId, targetUserId: userId, request: {} };
  await auditRefusals(database, call, event, async () => {
    requireApp(call.app, settings().apps);
    await auditedTransaction(database, call.wait, async (tx) => {
      if (!(await endSession(tx, session.sessionId))) throw new Refusal('CONCURRENT_CHANGE');
      return {
        outcome: undefined,
        record: await insertAuditRecord(tx, call, { ...event, outcome: 'ok', reason: '' }),
      };
    });
  });
}

/** Whose session the call came with, and how things stand with it. @throws Refusal */
export async function describeSession(
  { database, settings }: SessionDependencies,
  call: Call,
): Promise<Session> {
  const session = requireSession(await findSession(database.statements(call.wait), call.ust, undefined));
  const { userId } = session.user;
  Object.assign(call.learnt, { actorUserId: userId, targetUserId: userId });
  const event = { action: 'GetSession', actorUserId: userId, targetUserId: userId, request: {} };
  return await auditRefusals(database, call, event, async () => {
    requireApp(call.app, settings().apps);
    requireGoodStanding(session.user);
    return session;
  });
}
