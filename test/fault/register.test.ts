import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { type Action, checkRegister, type Operation, type Outcome } from './register.ts';

const change = (from: string, to: string): Action => ({ kind: 'change', from, to });
const set = (to: string): Action => ({ kind: 'set', to });
const verify = (password: string): Action => ({ kind: 'verify', password });

/** A history of `[called, returned, outcome, action]`, starting from the password `a`. */
function verdictOf(...rows: [number, number, Outcome, Action][]) {
  return checkRegister('a', historyOf(rows));
}

const historyOf = (rows: [number, number, Outcome, Action][]): Operation[] =>
  rows.map(([called, returned, outcome, action], index) => ({
    id: `op${index + 1}`,
    called,
    returned,
    outcome,
    action,
  }));

const isRight = (...rows: [number, number, Outcome, Action][]) =>
  assert.equal(verdictOf(...rows).kind, 'linearizable');

/** @returns the IDs of the minimal offending history. */
function offending(...rows: [number, number, Outcome, Action][]): string[] {
  const verdict = verdictOf(...rows);
  assert.equal(verdict.kind, 'violation');
  return verdict.kind === 'violation' ? verdict.history.map(({ id }) => id) : [];
}

describe('histories that a register explains', () => {
  test('nothing at all', () => isRight());
  test('changes one after the other, and what can be logged in with', () =>
    isRight(
      [1, 2, 'ok', change('a', 'b')],
      [3, 4, 'ok', verify('b')],
      [5, 6, 'wrong', verify('a')],
      [7, 8, 'ok', set('c')],
      [9, 10, 'wrong', change('b', 'd')],
      [11, 12, 'ok', verify('c')],
    ));
  test('overlapping calls take effect in either order', () => {
    isRight([1, 9, 'ok', set('b')], [2, 8, 'ok', set('c')], [10, 11, 'ok', verify('b')]);
    isRight([1, 9, 'ok', set('b')], [2, 8, 'ok', set('c')], [10, 11, 'ok', verify('c')]);
  });
  test('of two changes from one password one wins and the other is refused', () =>
    isRight([1, 4, 'ok', change('a', 'b')], [2, 5, 'refused', change('a', 'c')], [6, 7, 'ok', verify('b')]));
  test('an unknown change may have happened', () =>
    isRight([1, 2, 'unknown', change('a', 'b')], [3, 4, 'ok', verify('b')]));
  test('an unknown change may not have happened', () =>
    isRight([1, 2, 'unknown', change('a', 'b')], [3, 4, 'ok', verify('a')]));
  test('an unknown change may happen long after', () =>
    isRight(
      [1, 2, 'unknown', set('b')],
      [3, 4, 'ok', verify('a')],
      [5, 6, 'ok', change('a', 'c')],
      [7, 8, 'ok', verify('c')],
      [9, 10, 'ok', verify('b')],
    ));
  test('unknown changes may build upon each other', () =>
    isRight(
      [1, 2, 'unknown', change('a', 'b')],
      [3, 4, 'unknown', change('b', 'c')],
      [5, 6, 'unknown', change('c', 'd')],
      [7, 8, 'ok', verify('d')],
    ));
  test('a wrong password is explained by an unknown change alone', () =>
    isRight([1, 2, 'unknown', set('b')], [3, 4, 'wrong', verify('a')], [5, 6, 'ok', set('c')]));
  test('what is seen during a change is the old or the new', () =>
    isRight([1, 9, 'ok', change('a', 'b')], [2, 3, 'ok', verify('a')], [4, 5, 'ok', verify('b')]));
  test('many unknown changes do not make the search explode', () => {
    const rows: [number, number, Outcome, Action][] = [];
    let now = 0;
    for (let round = 0; round < 30; round++) {
      rows.push([++now, 0, 'unknown', set(`lost${round}`)]);
      rows.push([++now, ++now, 'ok', set(`p${round}`)], [++now, ++now, 'ok', verify(`p${round}`)]);
    }
    isRight(...rows);
  });
});

describe('histories that no register explains', () => {
  test('a lost update: two changes from one password succeed', () =>
    assert.deepEqual(
      offending(
        [1, 4, 'ok', change('a', 'b')],
        [2, 5, 'ok', change('a', 'c')],
        [6, 7, 'ok', verify('c')],
        [8, 9, 'ok', set('d')],
      ),
      ['op1', 'op2'],
    ));
  test('an acknowledged change is lost', () =>
    assert.deepEqual(offending([1, 2, 'ok', change('a', 'b')], [3, 4, 'ok', verify('a')]), ['op1', 'op2']));
  test('a refused change takes effect', () =>
    assert.deepEqual(
      offending([1, 2, 'ok', verify('a')], [3, 4, 'refused', change('a', 'b')], [5, 6, 'ok', verify('b')]),
      ['op3'],
    ));
  test('a change said to have had the wrong old password takes effect', () =>
    assert.deepEqual(
      offending([1, 2, 'ok', set('b')], [3, 4, 'wrong', change('b', 'c')], [5, 6, 'ok', verify('c')]),
      ['op1', 'op2'],
    ));
  test('a stale read', () =>
    assert.deepEqual(
      offending([1, 2, 'ok', set('b')], [3, 4, 'ok', verify('b')], [5, 6, 'ok', verify('a')]),
      ['op1', 'op3'],
    ));
  test('the right password is refused', () =>
    assert.deepEqual(offending([1, 2, 'wrong', change('a', 'b')]), ['op1']));
  test('two reads see the order of two changes differently', () =>
    assert.equal(
      offending(
        [1, 20, 'ok', set('b')],
        [2, 21, 'ok', set('c')],
        [3, 4, 'ok', verify('b')],
        [5, 6, 'ok', verify('c')],
        [7, 8, 'ok', verify('b')],
      ).length,
      5,
    ));
  test('an unknown change takes effect twice', () =>
    assert.deepEqual(
      offending(
        [1, 2, 'unknown', set('b')],
        [3, 4, 'ok', verify('b')],
        [5, 6, 'ok', set('c')],
        [7, 8, 'ok', verify('b')],
        [9, 10, 'ok', verify('b')],
      ).slice(-1),
      ['op4'],
    ));
  test('an unknown change cannot begin from a password that was left', () =>
    assert.deepEqual(
      offending(
        [1, 2, 'ok', change('a', 'b')],
        [3, 4, 'unknown', change('a', 'c')],
        [5, 6, 'ok', verify('c')],
      ),
      ['op1', 'op2', 'op3'],
    ));
  test('an effect before it was sent', () =>
    assert.deepEqual(offending([1, 2, 'ok', verify('b')], [3, 4, 'ok', set('b')]), ['op1']));
});

test('a search that takes too long is undecided, and says so', () => {
  const history = historyOf([
    [1, 9, 'ok', set('b')],
    [2, 10, 'ok', set('c')],
    [11, 12, 'ok', verify('x')],
  ]);
  assert.equal(checkRegister('a', history, 2).kind, 'undecided');
});
