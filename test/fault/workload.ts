/** Clients that change passwords, and remember exactly what they asked for, what they were told, and when. */
import { createHash } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { timestampMs } from '@bufbuild/protobuf/wkt';
import { type Client, ConnectError, createClient } from '@connectrpc/connect';
import { createGrpcTransport, Http2SessionManager } from '@connectrpc/connect-node';
import type { Connection } from 'mysql2/promise';
import { ErrorInfoSchema } from '../../gen/google/rpc/error_details_pb.ts';
import { SessionService } from '../../gen/rekey/v1/session_service_pb.ts';
import { type ChangePasswordResponse, UserService } from '../../gen/rekey/v1/user_service_pb.ts';
import { type AttemptedChange, checkLedger, type Finding, readLedger } from './ledger.ts';
import type { Random } from './random.ts';
import { type Action, checkRegister, describe, type Operation, type Outcome } from './register.ts';
import type { Stage } from './stage.ts';

/** What came back from one attempt. */
interface Reply<R> {
  readonly outcome: Outcome;
  /** The server's reason, or what the transport said. */
  readonly reason: string;
  readonly response: R | undefined;
}

/** Answers after which nobody can say whether the change was made. INTERNAL is never right, and is counted as a finding. */
const UNKNOWN = new Set(['UNAVAILABLE', 'DEADLINE_EXCEEDED', 'CANCELLED', 'INTERNAL']);
const WRONG = new Set(['OLD_PASSWORD_MISMATCH', 'CREDENTIALS_INVALID']);
/**
 * A retry with the same key tells what became of the change, says the contract: after one of these it was not
 * made. The others are given before anybody looks for the key.
 */
const TELLS_OF_THE_KEY = new Set(['OLD_PASSWORD_MISMATCH', 'CONCURRENT_CHANGE']);

export interface Person {
  readonly userId: string;
  readonly username: string;
  readonly initial: string;
  /** What the password may be, the likeliest first. */
  guesses: string[];
  sessions: string[];
  readonly history: Operation[];
  readonly changes: AttemptedChange[];
  unknowns: number;
}

/** What calls one server. */
interface Stub {
  readonly users: Client<typeof UserService>;
  readonly sessions: Client<typeof SessionService>;
  readonly manager: Http2SessionManager;
}

export interface Tally {
  /** `own change ok` and so on. */
  readonly operations: Map<string, number>;
  readonly reasons: Map<string, number>;
  total: number;
  unknown: number;
  retries: number;
}

/** A person is replaced by a new one after so many calls: short histories are quickly checked. */
const HISTORY_MAX = 120;
const UNKNOWNS_MAX = 14;
const ACTIVE_PEOPLE = 16;
const SUPER_USERS = 4;
const GUESSES_MAX = 8;
const CALL_TIMEOUT_MS = 8_000;
const RETRIES_MAX = 8;
const NOBODY_LISTENS = 'nobody listens';

const WEIGHTS = {
  'own change': 34,
  'super-user change': 16,
  'super-user change with the old password': 6,
  'log-in': 18,
  'log-in with a new password': 8,
  'own change, validate only': 4,
  'wrong old password': 4,
  'right taken away': 10,
};
type Kind = keyof typeof WEIGHTS;

export const tokenHash = (token: string) => createHash('sha256').update(token).digest('hex');

export class Workload {
  readonly tally: Tally = { operations: new Map(), reasons: new Map(), total: 0, unknown: 0, retries: 0 };
  /** Whatever is wrong and can be seen at once. */
  readonly findings: Finding[] = [];
  readonly #stage: Stage;
  readonly #random: Random;
  readonly #people: Person[] = [];
  readonly #everybody: Person[] = [];
  readonly #superUsers: Person[] = [];
  readonly #clients: Stub[] = [];
  #moment = 0;
  #serial = 0;
  #isOver = false;
  /** Monotonic milliseconds of the newest acknowledged change. */
  lastAcknowledged = 0;

  constructor(stage: Stage, random: Random) {
    this.#stage = stage;
    this.#random = random;
  }

  async prepare(): Promise<void> {
    for (const { url } of this.#stage.servers) {
      const manager = new Http2SessionManager(url);
      const transport = createGrpcTransport({ baseUrl: url, sessionManager: manager });
      this.#clients.push({
        users: createClient(UserService, transport),
        sessions: createClient(SessionService, transport),
        manager,
      });
    }
    for (let index = 0; index < SUPER_USERS; index++) this.#superUsers.push(await this.#newPerson(true));
    for (let index = 0; index < ACTIVE_PEOPLE; index++) this.#people.push(await this.#newPerson(false));
  }

  /** Lets so many clients work until `isEnough`. */
  async run(clients: number, isEnough: () => boolean): Promise<void> {
    this.#isOver = false;
    const loops = Array.from({ length: clients }, async () => {
      const random = this.#random.fork();
      while (!isEnough() && !this.#isOver) {
        try {
          await this.#actOnce(random);
        } catch (error) {
          // The operator's own connection is subject to the faults as well.
          if (error instanceof ConnectError) throw error;
          await sleep(50);
        }
      }
    });
    await Promise.all(loops);
  }

  stop(): void {
    this.#isOver = true;
  }

  dispose(): void {
    for (const { manager } of this.#clients) manager.abort();
  }

  /** Everything the clients know, against everything the database knows. To be asked when all is calm. */
  async check(db: Connection): Promise<{ findings: Finding[]; undecided: number; changes: number }> {
    const findings = [...this.findings];
    const initial = new Map(this.#everybody.map(({ userId, initial }) => [userId, initial]));
    const changes = this.#everybody.flatMap((person) => person.changes);
    const ledger = checkLedger(await readLedger(db), changes, initial);
    findings.push(...ledger.findings);
    let undecided = 0;
    for (const person of this.#everybody) {
      const final = ledger.final.get(person.userId) as string;
      await this.#finalLogin(person, final);
      const verdict = checkRegister(person.initial, person.history);
      if (verdict.kind === 'undecided') undecided++;
      if (verdict.kind === 'violation') {
        findings.push({
          userId: person.userId,
          what: 'no register explains this history',
          evidence: [`initial: ${person.initial}`, ...verdict.history.map(describe)],
        });
      }
    }
    return { findings, undecided, changes: ledger.final.size };
  }

  async #finalLogin(person: Person, password: string): Promise<void> {
    for (let attempt = 1; attempt <= 10; attempt++) {
      const reply = await this.#logIn(this.#random, person, 'final log-in', password);
      if (reply.outcome === 'ok' || reply.outcome === 'wrong') return;
      await sleep(100 * attempt);
    }
    this.findings.push({ userId: person.userId, what: 'the final log-in got no answer', evidence: [] });
  }

  async #newPerson(isSuperUser: boolean): Promise<Person> {
    const number = ++this.#serial;
    const username = `p${number}`;
    const initial = this.#password();
    const userId = await this.#stage.createUser({ username, password: initial, isSuperUser });
    const person: Person = {
      userId,
      username,
      initial,
      guesses: [initial],
      sessions: [await this.#stage.openSession(userId)],
      history: [],
      changes: [],
      unknowns: 0,
    };
    this.#everybody.push(person);
    return person;
  }

  #password(): string {
    return `pw-${(++this.#serial).toString(36)}-${this.#random.between(0, 0xffff).toString(36)}-x9`;
  }

  /** The password to prove: the likeliest, one of the others, or one that never was. */
  #guess(random: Random, person: Person): string {
    if (random.chance(0.8)) return person.guesses[0] ?? 'no password at all';
    return random.pick(person.guesses);
  }

  async #actOnce(random: Random): Promise<void> {
    const place = random.between(0, this.#people.length - 1);
    let person = this.#people[place] as Person;
    if (person.history.length > HISTORY_MAX || person.unknowns > UNKNOWNS_MAX) {
      person = await this.#newPerson(false);
      this.#people[place] = person;
    }
    const kind = random.weighted(WEIGHTS);
    switch (kind) {
      case 'own change':
        return await this.#ownChange(random, person, kind, this.#guess(random, person));
      case 'wrong old password':
        return await this.#ownChange(random, person, kind, `never-${++this.#serial}-password`);
      case 'super-user change':
        return await this.#superUserChange(random, person, kind, undefined);
      case 'super-user change with the old password':
        return await this.#superUserChange(random, person, kind, this.#guess(random, person));
      case 'log-in':
        return void (await this.#logIn(random, person, kind, this.#guess(random, person)));
      case 'log-in with a new password':
        return void (await this.#logInWithNewPassword(random, person, kind));
      case 'own change, validate only':
        return await this.#validateOnly(random, person, kind);
      case 'right taken away':
        return await this.#takeRightAway(random, person, kind);
    }
  }

  // ---- what clients do ---------------------------------------------------------------------------------------

  async #ownChange(random: Random, person: Person, kind: Kind, from: string): Promise<void> {
    const session = await this.#sessionOf(person, random);
    const to = this.#password();
    await this.#change(random, kind, person, person, session, { kind: 'change', from, to });
  }

  async #superUserChange(
    random: Random,
    person: Person,
    kind: Kind,
    from: string | undefined,
  ): Promise<void> {
    const superUser = random.pick(this.#superUsers);
    const session = await this.#sessionOf(superUser, random);
    const to = this.#password();
    const action: Action = from === undefined ? { kind: 'set', to } : { kind: 'change', from, to };
    await this.#change(random, kind, person, superUser, session, action);
  }

  /** One change: a single attempt, or with a key as many as it takes, some of them twice at once. */
  async #change(
    random: Random,
    kind: Kind,
    person: Person,
    actor: Person,
    session: string,
    action: Exclude<Action, { kind: 'verify' }>,
  ): Promise<void> {
    const id = `c${++this.#serial}`;
    const key = random.chance(0.55) ? `key-${id}` : undefined;
    const message = {
      newPassword: action.to,
      ...(action.kind === 'change' ? { oldPassword: action.from } : {}),
      ...(actor === person ? {} : { userId: person.userId }),
    };
    let attempts = 0;
    const attempt = (place: number) => {
      const headers = {
        ust: session,
        app: 'CRM',
        cid: `${id}.${++attempts}`,
        ...(key === undefined ? {} : { 'idempotency-key': key }),
      };
      return this.#call(random, (options) =>
        (this.#clients[place] as Stub).users.changePassword(message, {
          headers,
          ...options,
        }),
      );
    };
    const called = ++this.#moment;
    const first = random.between(0, this.#clients.length - 1);
    const isDoubled = key !== undefined && random.chance(0.25);
    const replies = isDoubled
      ? await Promise.all([attempt(first), attempt((first + 1) % this.#clients.length)])
      : [await attempt(first)];
    const answers: ChangePasswordResponse[] = [];
    let reply = combine(replies);
    let mayHaveHappened = replies.some(({ outcome }) => outcome === 'unknown');
    const isOpen = () => reply.outcome === 'unknown' || (mayHaveHappened && reply.reason === NOBODY_LISTENS);
    for (let retry = 1; key !== undefined && isOpen() && retry <= RETRIES_MAX; retry++) {
      this.tally.retries++;
      await sleep(random.between(1, 30) * retry);
      const next = await attempt((first + retry) % this.#clients.length);
      replies.push(next);
      reply = next;
      if (next.outcome === 'unknown') mayHaveHappened = true;
    }
    // Asking again what was done must give the same answer.
    if (key !== undefined && reply.outcome === 'ok' && random.chance(0.2)) {
      const again = await attempt(first);
      replies.push(again);
      if (TELLS_OF_THE_KEY.has(again.reason)) {
        this.findings.push({
          userId: person.userId,
          what: `one key, two answers: OK, then ${again.reason}`,
          evidence: [id],
        });
      }
    }
    for (const { response } of replies) if (response) answers.push(response);
    let outcome = reply.outcome;
    if (mayHaveHappened && outcome !== 'ok' && !TELLS_OF_THE_KEY.has(reply.reason)) outcome = 'unknown';
    const returned = ++this.#moment;
    const [one, ...others] = answers;
    for (const other of others) {
      if (one && !isSameAnswer(one, other)) {
        this.findings.push({
          userId: person.userId,
          what: 'one key, two answers',
          evidence: [id, JSON.stringify(one.sessionsEnded), JSON.stringify(other.sessionsEnded)],
        });
      }
    }
    const change: AttemptedChange = {
      id,
      action,
      outcome,
      called,
      returned,
      userId: person.userId,
      session: tokenHash(session),
      actorUserId: actor.userId,
      byOther: actor !== person,
    };
    person.changes.push(change);
    this.#remember(person, kind, change, reply.reason);
    if (outcome === 'ok') this.lastAcknowledged = performance.now();
    if (reply.reason === 'SESSION_INVALID' || reply.reason === 'CONCURRENT_CHANGE') forget(actor, session);
    if (outcome === 'ok' && actor !== person) person.sessions = [];
  }

  async #validateOnly(random: Random, person: Person, kind: Kind): Promise<void> {
    const session = await this.#sessionOf(person, random);
    const password = this.#guess(random, person);
    const id = `v${++this.#serial}`;
    const called = ++this.#moment;
    const reply = await this.#call(random, (options) =>
      random
        .pick(this.#clients)
        .users.changePassword(
          { oldPassword: password, newPassword: this.#password(), validateOnly: true },
          { headers: { ust: session, app: 'CRM', cid: `${id}.1` }, ...options },
        ),
    );
    this.#remember(
      person,
      kind,
      { id, action: { kind: 'verify', password }, outcome: reply.outcome, called, returned: ++this.#moment },
      reply.reason,
    );
    if (reply.reason === 'SESSION_INVALID') forget(person, session);
  }

  async #logIn(random: Random, person: Person, kind: string, password: string): Promise<Reply<unknown>> {
    const id = `l${++this.#serial}`;
    const called = ++this.#moment;
    const reply = await this.#call(random, (options) =>
      random
        .pick(this.#clients)
        .sessions.login(
          { username: person.username, password },
          { headers: { app: 'CRM', cid: `${id}.1` }, ...options },
        ),
    );
    this.#remember(
      person,
      kind,
      { id, action: { kind: 'verify', password }, outcome: reply.outcome, called, returned: ++this.#moment },
      reply.reason,
    );
    if (reply.response) person.sessions = [reply.response.ust, ...person.sessions].slice(0, 3);
    return reply;
  }

  async #logInWithNewPassword(random: Random, person: Person, kind: Kind): Promise<void> {
    const id = `n${++this.#serial}`;
    const from = this.#guess(random, person);
    const to = this.#password();
    const called = ++this.#moment;
    const reply = await this.#call(random, (options) =>
      random
        .pick(this.#clients)
        .sessions.login(
          { username: person.username, password: from, newPassword: to },
          { headers: { app: 'CRM', cid: `${id}.1` }, ...options },
        ),
    );
    const change: AttemptedChange = {
      id,
      action: { kind: 'change', from, to },
      outcome: reply.outcome,
      called,
      returned: ++this.#moment,
      userId: person.userId,
      session: undefined,
      actorUserId: person.userId,
      byOther: false,
    };
    person.changes.push(change);
    this.#remember(person, kind, change, reply.reason);
    if (reply.response) person.sessions = [reply.response.ust];
  }

  /** The operator ends a session, or demotes or locks somebody for a moment, while that one's calls are under way. */
  async #takeRightAway(random: Random, person: Person, kind: Kind): Promise<void> {
    const db = await this.#stage.connect();
    try {
      const superUser = random.pick(this.#superUsers);
      const what = random.weighted({ end: 5, demote: 3, lock: 2 });
      this.#count(`operator: ${kind}`, false);
      if (what === 'end') {
        const owner = random.chance(0.7) ? superUser : person;
        const session = owner.sessions[0];
        if (session === undefined) return;
        await db.query(
          'UPDATE sessions SET ended_at = UTC_TIMESTAMP(6) WHERE token_hash = UNHEX(?) AND ended_at IS NULL',
          [tokenHash(session)],
        );
        forget(owner, session);
        return;
      }
      const [column, off, userId] =
        what === 'demote' ? ['is_super_user', 0, superUser.userId] : ['is_locked', 1, person.userId];
      await db.query(`UPDATE users SET ${column} = ? WHERE user_id = ?`, [off, userId]);
      await sleep(random.between(1, 15));
      await this.#giveRightBack(
        `UPDATE users SET ${column} = ? WHERE user_id = ?`,
        [1 - Number(off), userId],
        db,
      );
    } finally {
      db.destroy();
    }
  }

  async #giveRightBack(statement: string, parameters: unknown[], first: Connection): Promise<void> {
    let db = first;
    for (let attempt = 1; ; attempt++) {
      try {
        await db.query(statement, parameters);
        return;
      } catch (error) {
        if (attempt > 100) throw error;
        await sleep(200);
        db = await this.#stage.connect().catch(() => db);
      } finally {
        if (db !== first) db.destroy();
      }
    }
  }

  // ---- how they do it ----------------------------------------------------------------------------------------

  /** A call with a deadline, now and then one that can't be met, or given up on the way. */
  async #call<R>(
    random: Random,
    call: (options: { timeoutMs: number; signal?: AbortSignal }) => Promise<R>,
  ): Promise<Reply<R>> {
    const timeoutMs = random.chance(0.03) ? random.between(2, 40) : CALL_TIMEOUT_MS;
    const giveUp = random.chance(0.04) ? AbortSignal.timeout(random.between(1, 30)) : undefined;
    try {
      const response = await call({ timeoutMs, ...(giveUp ? { signal: giveUp } : {}) });
      return { outcome: 'ok', reason: '', response };
    } catch (error) {
      if (!(error instanceof ConnectError)) throw error;
      const [info] = error.findDetails(ErrorInfoSchema);
      const reason = info?.reason ?? 'no answer';
      this.tally.reasons.set(reason, (this.tally.reasons.get(reason) ?? 0) + 1);
      if (reason === 'INTERNAL') {
        this.findings.push({ userId: '', what: 'INTERNAL', evidence: [`cid ${info?.metadata.cid}`] });
      }
      if (info && !UNKNOWN.has(reason)) {
        return { outcome: WRONG.has(reason) ? 'wrong' : 'refused', reason, response: undefined };
      }
      if (!info && isNeverSent(error)) {
        // Nobody was there: the next attempt need not come at once.
        await sleep(20);
        return { outcome: 'refused', reason: NOBODY_LISTENS, response: undefined };
      }
      return { outcome: 'unknown', reason, response: undefined };
    }
  }

  #remember(person: Person, kind: string, operation: Operation, reason: string): void {
    person.history.push(operation);
    const { action, outcome } = operation;
    this.#count(`${kind} ${outcome}`);
    if (outcome === 'unknown') {
      this.tally.unknown++;
      if (action.kind !== 'verify') person.unknowns++;
    }
    const to = action.kind === 'verify' ? action.password : action.to;
    if (outcome === 'ok') person.guesses = [to, ...person.guesses.filter((guess) => guess !== to)];
    else if (outcome === 'unknown' && action.kind !== 'verify') person.guesses.splice(1, 0, to);
    else if (outcome === 'wrong') {
      const wrong = action.kind === 'change' ? action.from : to;
      const rest = person.guesses.filter((guess) => guess !== wrong);
      person.guesses = rest.length === person.guesses.length ? rest : [...rest, wrong];
    } else if (reason === 'CONCURRENT_CHANGE') person.guesses.push(...person.guesses.splice(0, 1));
    person.guesses.splice(GUESSES_MAX);
  }

  #count(what: string, isCall = true): void {
    this.tally.operations.set(what, (this.tally.operations.get(what) ?? 0) + 1);
    if (isCall) this.tally.total++;
  }

  /** A live session, as far as the clients know: shared by all of them, as callers of one person share one. */
  async #sessionOf(person: Person, random: Random): Promise<string> {
    if (person.sessions.length === 0) person.sessions = [await this.#stage.openSession(person.userId)];
    return random.chance(0.85) ? (person.sessions[0] as string) : random.pick(person.sessions);
  }
}

function forget(person: Person, session: string): void {
  person.sessions = person.sessions.filter((other) => other !== session);
}

const isSameAnswer = (one: ChangePasswordResponse, other: ChangePasswordResponse) =>
  one.sessionsEnded === other.sessionsEnded &&
  (one.passwordExpiryTime && timestampMs(one.passwordExpiryTime)) ===
    (other.passwordExpiryTime && timestampMs(other.passwordExpiryTime));

function isNeverSent(error: ConnectError): boolean {
  const { code } = (error.cause ?? {}) as { code?: string };
  return code === 'ECONNREFUSED';
}

/** The answer to two attempts at once: a success if one of them is, else unknown if one of them is. */
function combine<R>(replies: readonly Reply<R>[]): Reply<R> {
  for (const outcome of ['ok', 'unknown'] as const) {
    const found = replies.find((reply) => reply.outcome === outcome);
    if (found) return found;
  }
  const telling = replies.find(({ reason }) => TELLS_OF_THE_KEY.has(reason));
  return telling ?? (replies[0] as Reply<R>);
}
