/**
 * What this machine can do at most: as many Argon2 computations at a time as the server has slots, on a pool as
 * large as the server's, with the server's own choice of engine, and nothing else going on.
 */
import { randomBytes } from 'node:crypto';
import { chooseEngine, type Engine } from '../src/password/engine.ts';
import type { Argon2Parameters } from '../src/password/phc.ts';
import { answerQuestions } from './child.ts';

export interface BoundQuestion {
  readonly slots: number;
  readonly seconds: number;
  readonly parameters: Argon2Parameters;
}

export interface BoundAnswer {
  readonly hashesPerSecond: number;
  readonly engine: string;
}

const { engine } = await chooseEngine(process.env.REKEY_HASH_ENGINE as 'auto' | Engine['name']);

answerQuestions<BoundQuestion, BoundAnswer>(async ({ slots, seconds, parameters }) => {
  const start = performance.now();
  const end = start + seconds * 1000;
  let hashes = 0;
  const slot = async () => {
    while (performance.now() < end) {
      await engine.argon2id('correct horse battery staple', randomBytes(16), undefined, 32, parameters);
      hashes++;
    }
  };
  await Promise.all(Array.from({ length: slots }, slot));
  return { hashesPerSecond: (hashes * 1000) / (performance.now() - start), engine: engine.name };
});
