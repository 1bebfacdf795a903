import assert from 'node:assert/strict';
import { once } from 'node:events';
import { type AddressInfo, createServer } from 'node:net';
import { after, describe, test } from 'node:test';
import { Wait } from '../../src/call.ts';
import { type AuditReference, insertAuditRecord, isRecorded } from '../../src/mysql/audit.ts';
import { lockUser, replacePassword } from '../../src/mysql/users.ts';
import { Refusal } from '../../src/password/errors.ts';
import { type Fate, startWireProxy } from '../support/mysql_wire.ts';
import { eventually, forAWhile, testBed } from './test_bed.ts';

const bed = await testBed();
const proxy = await startWireProxy(bed.url);
const database = bed.open({ REKEY_DATABASE_LOCK_WAIT_TIMEOUT_SECONDS: '1' }, proxy.through(bed.url));
after(() => proxy.close());

const there = { ...proxy.target };
const call = { cid: 'c', app: 'CRM', remoteAddress: '::1', peerAddress: '::1', claimedAddress: undefined };

/** A change as the service makes it, in as few statements: the hash, on condition, and the record of it. */
async function change(userId: string, from: string, to: string, wait = forAWhile()) {
  let attempts = 0;
  const asked: boolean[] = [];
  const record = await database
    .transaction<AuditReference>(wait, {
      work: async (tx) => {
        attempts++;
        const password = { hash: to, expiresAt: null, mustChange: false };
        if (!(await replacePassword(tx, userId, from, password))) throw new Refusal('CONCURRENT_CHANGE');
        return await insertAuditRecord(
          tx,
          { ...call, cid: to },
          { action: 'x', outcome: 'ok', reason: '', actorUserId: null, targetUserId: userId, request: {} },
        );
      },
      wasCommitted: async (tx, reference) => {
        await lockUser(tx, userId);
        const answer = await isRecorded(tx, reference);
        asked.push(answer);
        return answer;
      },
    })
    .catch((error: unknown) => {
      assert.ok(error instanceof Refusal, String(error));
      return error;
    });
  return { outcome: record instanceof Refusal ? record.reason : 'ok', error: record, attempts, asked };
}

async function stateOf(userId: string, cid: string) {
  const [user] = await bed.sql('SELECT password_hash FROM users WHERE user_id = ?', [userId]);
  const records = await bed.sql('SELECT audit_id FROM audit_log WHERE cid = ?', [cid]);
  return { hash: user?.password_hash, records: records.length };
}

/** Meets the next COMMIT with `fate`, and those after it with none. */
function meetCommit(fate: Fate, then = () => {}): () => boolean {
  let met = false;
  proxy.decide = ({ isCommit }) => {
    if (!isCommit || met) return 'pass';
    met = true;
    then();
    return fate;
  };
  return () => met;
}

describe('a COMMIT without an answer', () => {
  for (const [fate, asked, attempts] of [
    ['cut-before', [false], 2],
    ['cut-after', [true], 1],
  ] as const) {
    test(`is resolved truthfully: ${fate}`, async () => {
      for (let round = 0; round < 10; round++) {
        const userId = await bed.user();
        const met = meetCommit(fate);
        const result = await change(userId, 'first hash', `${fate} ${userId}`);
        assert.ok(met());
        assert.deepEqual([result.outcome, result.asked, result.attempts], ['ok', asked, attempts]);
        assert.deepEqual(await stateOf(userId, `${fate} ${userId}`), {
          hash: `${fate} ${userId}`,
          records: 1,
        });
      }
    });
  }

  for (const fate of ['cut-during', 'late'] as const) {
    test(`is resolved truthfully whichever way it went: ${fate}`, async () => {
      for (let round = 0; round < 10; round++) {
        const userId = await bed.user();
        const met = meetCommit(fate);
        const result = await change(userId, 'first hash', `${fate} ${userId}`);
        assert.ok(met());
        assert.equal(result.outcome, 'ok');
        assert.equal(result.attempts, result.asked[0] ? 1 : 2);
        await eventually('late commands have arrived', async () => proxy.underWay === 0);
        assert.deepEqual(await stateOf(userId, `${fate} ${userId}`), {
          hash: `${fate} ${userId}`,
          records: 1,
        });
      }
    });
  }

  test('is not tried again over the change of somebody who came in between', async () => {
    for (let round = 0; round < 5; round++) {
      const userId = await bed.user();
      const between = Promise.withResolvers<unknown>();
      meetCommit('cut-before', () => {
        between.resolve(bed.sql("UPDATE users SET password_hash = 'in between' WHERE user_id = ?", [userId]));
      });
      const result = await change(userId, 'first hash', `lost ${userId}`);
      await between.promise;
      const state = await stateOf(userId, `lost ${userId}`);
      // Whoever came first, the answer is what happened.
      if (result.outcome === 'ok') assert.equal(state.records, 1);
      else {
        assert.equal(result.outcome, 'CONCURRENT_CHANGE');
        assert.deepEqual(state, { hash: 'in between', records: 0 });
      }
    }
  });

  for (const [fate, outcome, records] of [
    ['cut-after', 'ok', 1],
    ['cut-before', 'CANCELLED', 0],
  ] as const) {
    test(`is resolved even if nobody waits any more: ${fate}`, async () => {
      const userId = await bed.user();
      const controller = new AbortController();
      meetCommit(fate, () => controller.abort());
      const wait = new Wait(controller.signal, performance.now() + 60_000);
      const result = await change(userId, 'first hash', `gone ${userId}`, wait);
      assert.equal(result.outcome, outcome);
      assert.equal((await stateOf(userId, `gone ${userId}`)).records, records);
    });
  }

  test('is UNAVAILABLE, never a definite refusal, if the truth cannot be learnt in time', async () => {
    const userId = await bed.user();
    const blackHole = createServer().listen(0, '127.0.0.1');
    await once(blackHole, 'listening');
    const { port } = blackHole.address() as AddressInfo;
    meetCommit('cut-after', () => {
      proxy.target = { host: '127.0.0.1', port };
    });
    const result = await change(userId, 'first hash', `unknown ${userId}`);
    proxy.target = there;
    proxy.cut();
    blackHole.close();
    assert.equal(result.outcome, 'UNAVAILABLE');
    assert.ok(result.error instanceof Refusal && result.error.cause instanceof Error);
    assert.equal(result.attempts, 1);
    assert.equal((await stateOf(userId, `unknown ${userId}`)).records, 1);
  });
});

describe('a connection that is cut', () => {
  for (const place of [1, 2]) {
    for (const fate of ['cut-before', 'cut-during', 'cut-after'] as const) {
      test(`at statement ${place} begins the transaction again, with one effect: ${fate}`, async () => {
        const userId = await bed.user();
        let met = false;
        proxy.decide = (command) => {
          if (met || !command.isTransactional || command.kind !== 'execute' || command.place !== place)
            return 'pass';
          met = true;
          return fate;
        };
        const result = await change(userId, 'first hash', `place ${place} ${fate}`);
        assert.ok(met);
        assert.deepEqual([result.outcome, result.asked, result.attempts], ['ok', [], 2]);
        assert.deepEqual(await stateOf(userId, `place ${place} ${fate}`), {
          hash: `place ${place} ${fate}`,
          records: 1,
        });
      });
    }
  }

  test('with all the others is nothing that the next calls notice', async () => {
    proxy.decide = undefined;
    for (let round = 0; round < 5; round++) {
      const users = await Promise.all([1, 2, 3, 4].map(() => bed.user()));
      const changing = users.map((userId) => change(userId, 'first hash', `all ${userId}`));
      proxy.cut();
      for (const { outcome } of await Promise.all(changing)) assert.equal(outcome, 'ok');
      for (const userId of users) assert.equal((await stateOf(userId, `all ${userId}`)).records, 1);
    }
  });
});

describe('a database that does not answer', () => {
  test('ends the call at its deadline, and is used again when it answers', async () => {
    proxy.decide = undefined;
    const userId = await bed.user();
    await change(userId, 'first hash', 'before the stall');
    proxy.stall();
    const start = performance.now();
    const result = await change(userId, 'before the stall', 'in the stall', Wait.forMs(400));
    assert.ok(performance.now() - start < 5_000);
    assert.ok(['UNAVAILABLE', 'DEADLINE_EXCEEDED'].includes(result.outcome), result.outcome);
    proxy.resume();
    assert.equal((await change(userId, 'before the stall', 'after the stall')).outcome, 'ok');
    assert.equal((await stateOf(userId, 'in the stall')).records, 0);
  });
});
