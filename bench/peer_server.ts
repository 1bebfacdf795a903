/**
 * The peer: better-auth behind node:http, on the same database server, hashing with the same parameters by the
 * same engine on a pool of the same size. Its rate limit is off, as it would otherwise be all that is measured.
 */
import { randomBytes, timingSafeEqual } from 'node:crypto';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { betterAuth } from 'better-auth';
import { getMigrations } from 'better-auth/db/migration';
import { toNodeHandler } from 'better-auth/node';
import mysql from 'mysql2/promise';
import { chooseEngine, type Engine } from '../src/password/engine.ts';
import { type Argon2Parameters, formatArgon2, parseArgon2 } from '../src/password/phc.ts';
import { answerQuestions } from './child.ts';

export interface PeerQuestion {
  readonly databaseUrl: string;
  readonly poolSize: number;
  readonly secret: string;
  readonly parameters: Argon2Parameters;
}

export interface PeerAnswer {
  readonly url: string;
}

const SALT_BYTES = 16;
const HASH_BYTES = 32;
const { engine } = await chooseEngine(process.env.REKEY_HASH_ENGINE as 'auto' | Engine['name']);

answerQuestions<PeerQuestion, PeerAnswer>(async ({ databaseUrl, poolSize, secret, parameters }) => {
  const listener = createServer();
  await new Promise<void>((resolve) => listener.listen(0, '127.0.0.1', resolve));
  const url = `http://127.0.0.1:${(listener.address() as AddressInfo).port}`;
  const options = {
    baseURL: url,
    secret,
    database: mysql.createPool({ uri: databaseUrl, timezone: 'Z', connectionLimit: poolSize }),
    rateLimit: { enabled: false },
    telemetry: { enabled: false },
    emailAndPassword: {
      enabled: true,
      password: {
        hash: async (password: string) => {
          const salt = randomBytes(SALT_BYTES);
          const hash = await engine.argon2id(password, salt, undefined, HASH_BYTES, parameters);
          return formatArgon2({ ...parameters, pepperId: undefined, salt, hash });
        },
        verify: async ({ hash: stored, password }: { hash: string; password: string }) => {
          const parsed = parseArgon2(stored);
          if (!parsed) return false;
          const actual = await engine.argon2id(password, parsed.salt, undefined, parsed.hash.length, parsed);
          return timingSafeEqual(actual, parsed.hash);
        },
      },
    },
  };
  const { runMigrations } = await getMigrations(options);
  await runMigrations();
  listener.on('request', toNodeHandler(betterAuth(options)));
  return { url };
});
