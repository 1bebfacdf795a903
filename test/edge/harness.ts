/** What the tests of the edge share: chance, memory, calls over `node:http2`, and a client that behaves. */
import assert from 'node:assert/strict';
import { randomInt } from 'node:crypto';
import { readFileSync } from 'node:fs';
import http2, { type ClientHttp2Session, type OutgoingHttpHeaders } from 'node:http2';
import { setTimeout as sleep } from 'node:timers/promises';
import { status as Code } from '@grpc/grpc-js';
import { SessionService } from '../../gen/rekey/v1/session_service_pb.ts';
import type { ServerProcess, Service } from '../support/service.ts';

export const CHANGE = '/rekey.v1.UserService/ChangePassword';
export const LOGIN = '/rekey.v1.SessionService/Login';
export const GET_SESSION = '/rekey.v1.SessionService/GetSession';
export const HEALTH_CHECK = '/grpc.health.v1.Health/Check';
export const HEALTH_WATCH = '/grpc.health.v1.Health/Watch';
export const REFLECTION = '/grpc.reflection.v1.ServerReflection/ServerReflectionInfo';

/** Of REKEY_TEST_SEED, or a new one. */
export const chooseSeed = (): number => Number(process.env.REKEY_TEST_SEED ?? randomInt(2 ** 31));

export interface Chance {
  /** From 0 to below `limit`. */
  below(limit: number): number;
  pick<T>(things: readonly T[]): T;
  bytes(length: number): Buffer;
}

/** Mulberry32: the same seed, the same chance. */
export function chance(seed: number): Chance {
  let state = seed >>> 0;
  const next = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
  const below = (limit: number) => Math.floor(next() * limit);
  return {
    below,
    pick: <T>(things: readonly T[]) => things[below(things.length)] as T,
    bytes: (length) => Buffer.from(Array.from({ length }, () => below(256))),
  };
}

/** Resident memory of a process. */
export function residentMiB(pid: number): number {
  const [, kib = ''] = /^VmRSS:\s+(\d+) kB/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8')) ?? [];
  return Number(kib) / 1024;
}

/** The lowest that the memory comes down to within that time. */
export async function settledMiB(
  pid: number,
  isEnough: (mib: number) => boolean,
  patienceMs = 8000,
): Promise<number> {
  const deadline = performance.now() + patienceMs;
  let lowest = residentMiB(pid);
  while (!isEnough(lowest) && performance.now() < deadline) {
    await sleep(250);
    lowest = Math.min(lowest, residentMiB(pid));
  }
  return lowest;
}

export function quantile(values: readonly number[], share: number): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? 0;
}

// ---- calls over node:http2 --------------------------------------------------------------------------------------

/** A gRPC status by its name, `HTTP 405`, `RST 8`, or `CUT` where the connection ended first. */
export interface Outcome {
  readonly result: string;
  readonly message: string;
  /** The bytes of `grpc-status-details-bin` as Latin-1. */
  readonly details: string;
}

export async function connectHttp2(
  address: string,
  options: http2.ClientSessionOptions = {},
): Promise<ClientHttp2Session> {
  const session = http2.connect(`http://${address}`, options);
  session.on('error', () => {});
  await new Promise((resolve) => session.once('remoteSettings', resolve));
  return session;
}

const HUNG_MS = 20_000;

/** One call; its headers over those of a good one. What gets no answer at all fails the test. */
export function exchange(
  session: ClientHttp2Session,
  headers: OutgoingHttpHeaders,
  body: Buffer | undefined,
): Promise<Outcome> {
  return new Promise((resolve, reject) => {
    const all = { ':method': 'POST', te: 'trailers', 'content-type': 'application/grpc', ...headers };
    const stream = session.request(all, { endStream: body === undefined });
    let status = 0;
    let grpc: http2.IncomingHttpHeaders = {};
    const timer = setTimeout(() => {
      reject(new Error(`no answer: ${JSON.stringify(headers)} ${body?.toString('hex').slice(0, 200)}`));
      stream.destroy();
    }, HUNG_MS);
    stream.on('response', (answer) => {
      status = Number(answer[':status']);
      grpc = answer;
    });
    stream.on('trailers', (trailers) => {
      grpc = trailers;
    });
    stream.on('error', () => {});
    stream.on('close', () => {
      clearTimeout(timer);
      const code = grpc['grpc-status'];
      const result =
        code !== undefined
          ? (Code[Number(code)] ?? `status ${code}`)
          : status !== 0 && status !== 200
            ? `HTTP ${status}`
            : stream.rstCode
              ? `RST ${stream.rstCode}`
              : 'CUT';
      const details = Buffer.from(String(grpc['grpc-status-details-bin'] ?? ''), 'base64').toString('latin1');
      resolve({ result, message: String(grpc['grpc-message'] ?? ''), details });
    });
    stream.resume();
    if (body !== undefined) stream.end(body);
  });
}

// ---- a client that behaves --------------------------------------------------------------------------------------

export interface Bystander {
  /** Of the calls so far, since the last time this was asked. */
  takeLatencies(): number[];
  /** Fails if any call of it failed. */
  stop(): Promise<void>;
}

/** Calls GetSession one after the other, on a connection of its own, while others misbehave. */
export async function bystander(service: Service, server: ServerProcess, pauseMs = 5): Promise<Bystander> {
  const { ust } = await service.createUser();
  const sessions = server.client(SessionService);
  const failures: unknown[] = [];
  let latencies: number[] = [];
  let isStopped = false;
  const running = (async () => {
    while (!isStopped) {
      const start = performance.now();
      try {
        await sessions.getSession({}, { headers: { ust, app: 'CRM' }, timeoutMs: 10_000 });
        latencies.push(performance.now() - start);
      } catch (error) {
        failures.push(error);
      }
      await sleep(pauseMs);
    }
  })();
  return {
    takeLatencies: () => {
      const taken = latencies;
      latencies = [];
      return taken;
    },
    stop: async () => {
      isStopped = true;
      await running;
      assert.deepEqual(failures, [], 'every call of a client that behaves succeeds');
    },
  };
}
