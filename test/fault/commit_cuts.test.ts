import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { type PrivateDatabase, startPrivateDatabase } from '../support/private_database.ts';
import { Caller, truthOf } from './caller.ts';
import { Random } from './random.ts';
import { buildStage, LEDGER_SERVER_ARGS, type Stage } from './stage.ts';

const CUTS = Number(process.env.REKEY_FAULT_CUTS ?? 1000);
const WORKERS = 6;
const FATES = ['cut-before', 'cut-during', 'cut-after', 'late'] as const;
const seed = Number(process.env.REKEY_FAULT_SEED ?? Math.floor(Math.random() * 1e9));

let database: PrivateDatabase;
let stage: Stage;

before(async () => {
  database = await startPrivateDatabase({ kind: 'mariadb', args: LEDGER_SERVER_ARGS });
  stage = await buildStage({ databaseUrl: () => database.url(), servers: 1 });
});

after(async () => {
  await stage?.dispose();
  await database?.dispose();
});

test(`${CUTS} cuts around COMMIT, and no wrong answer (seed ${seed})`, async (t) => {
  const random = new Random(seed);
  const cuts = new Map<string, number>();
  let done = 0;
  stage.proxy.decide = ({ isCommit }) => {
    if (!isCommit || done >= CUTS || random.chance(0.3)) return 'pass';
    done++;
    const fate = random.pick(FATES);
    cuts.set(fate, (cuts.get(fate) ?? 0) + 1);
    return fate;
  };
  const answers = new Map<string, number>();
  const wrong: string[] = [];
  const caller = new Caller(stage);

  const work = async (worker: number) => {
    const db = await stage.connect();
    const username = `worker${worker}`;
    let password = `first-password-of-${worker}`;
    const userId = await stage.createUser({ username, password });
    const ust = await stage.openSession(userId);
    for (let serial = 1; done < CUTS; serial++) {
      const cid = `${username}.${serial}`;
      const next = `password-${worker}-${serial}`;
      const key = serial % 2 === 0 ? `key-${serial}` : undefined;
      const request = { oldPassword: password, newPassword: next };
      const first = await caller.change({ ust, cid, key }, request);
      const truth = await truthOf(db, stage.hasher, userId, [password, next], cid);
      answers.set(first.reason, (answers.get(first.reason) ?? 0) + 1);
      const isChanged = truth.password === next;
      const complain = (what: string) => wrong.push(`${cid}: ${what}; ${JSON.stringify({ first, truth })}`);
      if (truth.records !== (isChanged ? 1 : 0)) complain('hash and audit disagree');
      if (first.isUnknown) {
        const again =
          key === undefined ? undefined : await caller.change({ ust, cid: `${cid}-again`, key }, request);
        const last = await truthOf(db, stage.hasher, userId, [password, next], cid);
        if (again?.reason === 'OK' && last.password !== next)
          complain('a retry was told OK, and nothing was changed');
        password = last.password;
        continue;
      }
      if ((first.reason === 'OK') !== isChanged) complain('the answer is wrong');
      if (first.reason === 'OK' && key !== undefined) {
        const again = await caller.change({ ust, cid: `${cid}-again`, key }, request);
        if (!again.isUnknown && again.answer !== first.answer) complain(`the retry got ${again.reason}`);
      }
      password = truth.password;
    }
    db.destroy();
  };
  await Promise.all(Array.from({ length: WORKERS }, (_, worker) => work(worker)));
  caller.dispose();
  t.diagnostic(`cuts: ${JSON.stringify(Object.fromEntries(cuts))}`);
  t.diagnostic(`answers: ${JSON.stringify(Object.fromEntries(answers))}; wrong: ${wrong.length}`);
  assert.deepEqual(wrong, []);
  assert.ok(done >= CUTS);
  // With the database there again at once, the truth can be learnt nearly always.
  const unknown = [...answers]
    .filter(([reason]) => reason !== 'OK')
    .reduce((sum, [, times]) => sum + times, 0);
  assert.ok(unknown <= done / 10, `${unknown} answers were not OK`);
});
