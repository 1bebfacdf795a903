/**
 * The load client: a process of its own that calls as it is told and reports how each call went. Messages are
 * encoded here and go through grpc-js as raw bytes, which keeps the client an order of magnitude cheaper than
 * what it measures.
 */
import { createHmac } from 'node:crypto';
import { Agent, request as httpRequest } from 'node:http';
import { create, toBinary } from '@bufbuild/protobuf';
import { Client, status as Code, credentials, Metadata } from '@grpc/grpc-js';
import { ChangePasswordRequestSchema } from '../gen/rekey/v1/user_service_pb.ts';
import { answerQuestions } from './child.ts';
import { APP, PASSWORDS, tokenOf, WEAK_PASSWORD } from './people.ts';

/** Whom to call. */
export type Target =
  | { readonly kind: 'rekey'; readonly addresses: readonly string[]; readonly population: string }
  | { readonly kind: 'better-auth'; readonly url: string; readonly secret: string };

/** What to call: a change that succeeds, or one of the cheap calls. */
export type CallKind = 'change' | 'health' | 'bad-token' | 'weak-password';

export interface Load {
  readonly target: Target;
  readonly call: CallKind;
  /** Persons from (included) and to (excluded), each with one call at a time. */
  readonly people: readonly [from: number, to: number];
  /** Closed: so many callers, each waiting for its answer. Open: so many calls a second, by the clock, come what may. */
  readonly arrivals: { readonly callers: number } | { readonly perSecond: number };
  /** Not counted. */
  readonly warmUpSeconds: number;
  readonly seconds: number;
  /** Of each call. */
  readonly deadlineMs: number;
}

export interface LoadReport {
  /** Measured. */
  readonly seconds: number;
  /** By outcome (`OK`, `RESOURCE_EXHAUSTED` …), how long each call took that ended in time, sorted, in milliseconds; from when it was due. */
  readonly latencies: Record<string, Float64Array>;
  /** CPU time of this process, in milliseconds. */
  readonly cpuMs: number;
  /** `Date.now()` when the counting began and ended. */
  readonly from: number;
  readonly to: number;
}

interface Person {
  readonly n: number;
  /** Index of the password that is set now, for all one knows. */
  password: number;
  /** Of the one that is set if a call without an answer did its work after all. */
  doubt: number | undefined;
  token: string;
}

/** @returns the outcome. */
type Caller = (person: Person, newPassword: number, deadlineMs: number) => Promise<string>;

const CONNECTIONS = 8;
const OK = 'OK';
/** After these the caller does not know which password is set. */
const UNKNOWN = new Set(['DEADLINE_EXCEEDED', 'CANCELLED', 'UNAVAILABLE', 'INTERNAL', 'UNKNOWN']);

const targets = new Map<string, (call: CallKind) => Caller>();
/** What a wrong old password is answered with. */
const MISMATCH = new Set(['PERMISSION_DENIED', 'HTTP 400']);

const everybody = new Map<string, Map<number, Person>>();

answerQuestions<Load, LoadReport>(async (load) => {
  const key = JSON.stringify(load.target);
  const population = load.target.kind === 'rekey' ? load.target.population : load.target.kind;
  let target = targets.get(key);
  if (!target) {
    target = load.target.kind === 'rekey' ? rekey(load.target.addresses) : betterAuth(load.target);
    targets.set(key, target);
  }
  const people = everybody.get(population) ?? new Map<number, Person>();
  everybody.set(population, people);
  return await run(load, target(load.call), people);
});

async function run(load: Load, call: Caller, people: Map<number, Person>): Promise<LoadReport> {
  const free: Person[] = [];
  for (let n = load.people[0]; n < load.people[1]; n++) {
    const person = people.get(n) ?? { n, password: 0, doubt: undefined, token: tokenOf(n) };
    people.set(n, person);
    free.push(person);
  }
  let nextFree = 0;
  const begin = performance.now() + load.warmUpSeconds * 1000;
  const end = begin + load.seconds * 1000;
  const latencies: Record<string, number[]> = {};
  let cpuAtBegin = process.cpuUsage();
  let from = Date.now();
  const beginTimer = setTimeout(() => {
    cpuAtBegin = process.cpuUsage();
    from = Date.now();
  }, load.warmUpSeconds * 1000);

  const one = async (due: number) => {
    const person = free[nextFree++];
    if (!person) throw new Error('all people are busy: give the load client more of them');
    const newPassword =
      load.call === 'change' ? (person.password + 1 + (nextFree % 62)) % PASSWORDS.length : 0;
    const outcome = await call(person, newPassword, load.deadlineMs);
    const now = performance.now();
    if (now >= begin && now < end) {
      latencies[outcome] ??= [];
      latencies[outcome].push(now - due);
    }
    if (load.call === 'change') learn(person, outcome, newPassword);
    free.push(person);
    // What was taken is forgotten now and then.
    if (nextFree > 10_000) {
      free.splice(0, nextFree);
      nextFree = 0;
    }
  };

  if ('callers' in load.arrivals) {
    const caller = async () => {
      while (performance.now() < end) await one(performance.now());
    };
    await Promise.all(Array.from({ length: load.arrivals.callers }, caller));
  } else await byTheClock(load.arrivals.perSecond, end, one);

  clearTimeout(beginTimer);
  const { user, system } = process.cpuUsage(cpuAtBegin);
  const sorted = Object.entries(latencies).map(
    ([outcome, values]) => [outcome, Float64Array.from(values).sort()] as const,
  );
  return {
    seconds: load.seconds,
    latencies: Object.fromEntries(sorted),
    cpuMs: (user + system) / 1000,
    from,
    to: from + load.seconds * 1000,
  };
}

function learn(person: Person, outcome: string, newPassword: number): void {
  if (outcome === OK) {
    person.password = newPassword;
    person.doubt = undefined;
  } else if (UNKNOWN.has(outcome)) person.doubt ??= newPassword;
  else if (MISMATCH.has(outcome) && person.doubt !== undefined) {
    person.password = person.doubt;
    person.doubt = undefined;
  }
}

/** Independent arrivals (Poisson), each at its time whatever became of those before it. */
async function byTheClock(
  perSecond: number,
  end: number,
  one: (due: number) => Promise<void>,
): Promise<void> {
  const underWay = new Set<Promise<void>>();
  const gap = () => (-Math.log(1 - Math.random()) * 1000) / perSecond;
  for (let due = performance.now() + gap(); due < end; due += gap()) {
    const ahead = due - performance.now();
    if (ahead > 0) await new Promise((resolve) => setTimeout(resolve, ahead));
    const work = one(due).finally(() => underWay.delete(work));
    underWay.add(work);
  }
  await Promise.all(underWay);
}

function rekey(addresses: readonly string[]): (call: CallKind) => Caller {
  const channels = addresses.flatMap((address) =>
    Array.from(
      { length: CONNECTIONS },
      () =>
        new Client(address, credentials.createInsecure(), {
          'grpc.use_local_subchannel_pool': 1,
          'grpc.enable_retries': 0,
        }),
    ),
  );
  let next = 0;
  const same = (bytes: Buffer) => bytes;
  const send = (path: string, message: Buffer, headers: Record<string, string>, deadlineMs: number) =>
    new Promise<string>((resolve) => {
      const metadata = new Metadata();
      for (const [name, value] of Object.entries(headers)) metadata.set(name, value);
      const channel = channels[next++ % channels.length] as Client;
      const options = { deadline: Date.now() + deadlineMs };
      channel.makeUnaryRequest(path, same, same, message, metadata, options, (error) =>
        resolve(error ? Code[error.code] : OK),
      );
    });
  const change = (token: string, oldPassword: string, newPassword: string, deadlineMs: number) => {
    const message = create(ChangePasswordRequestSchema, { oldPassword, newPassword });
    const bytes = Buffer.from(toBinary(ChangePasswordRequestSchema, message));
    return send('/rekey.v1.UserService/ChangePassword', bytes, { app: APP, ust: token }, deadlineMs);
  };
  const password = (index: number) => PASSWORDS[index] as string;
  const calls: Record<CallKind, Caller> = {
    change: (person, newPassword, deadlineMs) =>
      change(person.token, password(person.password), password(newPassword), deadlineMs),
    health: (_person, _new, deadlineMs) =>
      send('/grpc.health.v1.Health/Check', Buffer.alloc(0), {}, deadlineMs),
    'bad-token': (person, newPassword, deadlineMs) =>
      change(`x${person.token}`, password(person.password), password(newPassword), deadlineMs),
    'weak-password': (person, _new, deadlineMs) =>
      change(person.token, password(person.password), WEAK_PASSWORD, deadlineMs),
  };
  return (call) => calls[call];
}

function betterAuth({ url, secret }: Target & { kind: 'better-auth' }): (call: CallKind) => Caller {
  const agent = new Agent({ keepAlive: true, maxSockets: 4096 });
  const signed = (token: string) =>
    encodeURIComponent(`${token}.${createHmac('sha256', secret).update(token).digest('base64')}`);
  const change: Caller = (person, newPassword, deadlineMs) =>
    new Promise<string>((resolve) => {
      const body = JSON.stringify({
        currentPassword: PASSWORDS[person.password],
        newPassword: PASSWORDS[newPassword],
        revokeOtherSessions: true,
      });
      const headers = {
        'content-type': 'application/json',
        'content-length': Buffer.byteLength(body),
        origin: url,
        cookie: `better-auth.session_token=${signed(person.token)}`,
      };
      const signal = AbortSignal.timeout(deadlineMs);
      const request = httpRequest(
        `${url}/api/auth/change-password`,
        { method: 'POST', agent, headers, signal },
        (response) => {
          let text = '';
          response.setEncoding('utf8').on('data', (part: string) => {
            text += part;
          });
          response.on('error', () => resolve('DEADLINE_EXCEEDED'));
          response.on('end', () => {
            if (response.statusCode !== 200) return resolve(`HTTP ${response.statusCode}`);
            person.token = JSON.parse(text).token;
            resolve(OK);
          });
        },
      );
      request.on('error', () => resolve(signal.aborted ? 'DEADLINE_EXCEEDED' : 'UNAVAILABLE'));
      request.end(body);
    });
  return () => change;
}
