/** Whoever floods the hashing waits for himself: others are served meanwhile, long before their deadlines. */
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { type Service, startService, strongPassword, type TestUser } from '../support/service.ts';

/** Several times the work of the defaults, so that the flood fills seconds of the queue on any machine. */
const HASHING = { REKEY_HASH_MEMORY_KIB: '19456', REKEY_HASH_ITERATIONS: '10' };
const FLOOD_CALLS = 300;
const FLOOD_DEADLINE_MS = 60_000;
/** A small part of what the whole flood takes. */
const OTHERS_DEADLINE_MS = 5_000;
const OTHERS_CALLS = 5;

let service: Service;

before(async () => {
  service = await startService({
    ...HASHING,
    REKEY_LIMITS_CALL_TIMEOUT_MS: String(FLOOD_DEADLINE_MS),
    REKEY_LIMITS_STREAMS_PER_CONNECTION: String(2 * FLOOD_CALLS),
  });
});
after(async () => {
  await service.stop();
});

/** All checks, and a hash of the old password. */
const validate = (user: TestUser, app: string, timeoutMs: number, signal?: AbortSignal) =>
  service.server.change(
    { ust: user.ust, app },
    { oldPassword: user.password, newPassword: strongPassword(), validateOnly: true },
    { timeoutMs, ...(signal ? { signal } : {}) },
  );

for (const [who, app] of [
  ['another person behind the same peer and application', 'CRM'],
  ['another application', 'ERP'],
] as const) {
  test(`one person's flood leaves ${who} room`, async (t) => {
    const flooder = await service.createUser();
    const other = await service.createUser();
    const end = new AbortController();
    let floodCalls = 0;
    const pour = async () => {
      while (!end.signal.aborted) {
        await validate(flooder, 'CRM', FLOOD_DEADLINE_MS, end.signal);
        floodCalls++;
      }
    };
    const flood = Array.from({ length: FLOOD_CALLS }, pour);
    // By now the queue is full of it.
    await validate(flooder, 'CRM', FLOOD_DEADLINE_MS);

    const answers = [];
    const floodBefore = floodCalls;
    for (let i = 0; i < OTHERS_CALLS; i++)
      answers.push((await validate(other, app, OTHERS_DEADLINE_MS)).code);
    const passed = floodCalls - floodBefore;
    t.diagnostic(`${OTHERS_CALLS} calls were served among ${passed} of the flood`);
    end.abort();
    await Promise.all(flood);
    assert.deepEqual(answers, Array(OTHERS_CALLS).fill('OK'));
    assert.ok(passed < FLOOD_CALLS, 'in turn, and not behind all that came before');
  });
}
