/** How much a run does. */
export interface Scale {
  readonly rounds: number;
  /** Of each load that is counted. */
  readonly seconds: number;
  readonly callers: readonly number[];
  readonly peerCallers: readonly number[];
  /** Offered load, as multiples of the capacity. */
  readonly offered: readonly number[];
  readonly overloadRounds: number;
  readonly offeredToPeer: readonly number[];
  /** People in the database of most measurements, and in the large one of the growth measurement. */
  readonly users: number;
  readonly largeUsers: number;
  /** Megabytes. */
  readonly bufferPool: number;
}

const SMALL_USERS = 1_000;
export const SESSIONS_EACH = 10;

export const smallPopulation = { users: SMALL_USERS, sessionsEach: SESSIONS_EACH };

export const SCALES = {
  quick: {
    rounds: 2,
    seconds: 1.3,
    callers: [2, 8, 32, 128],
    peerCallers: [8],
    offered: [0.5, 1, 10],
    overloadRounds: 1,
    offeredToPeer: [],
    users: 10_000,
    largeUsers: 10_000,
    bufferPool: 512,
  },
  usual: {
    rounds: 5,
    seconds: 6,
    callers: [2, 8, 32, 128],
    peerCallers: [8, 32],
    offered: [0.5, 0.8, 1, 1.5, 2, 3, 5, 10],
    overloadRounds: 3,
    offeredToPeer: [1, 2],
    users: 20_000,
    largeUsers: 100_000,
    bufferPool: 1024,
  },
  full: {
    rounds: 5,
    seconds: 6,
    callers: [2, 8, 32, 128],
    peerCallers: [8, 32],
    offered: [0.5, 0.8, 1, 1.5, 2, 3, 5, 10],
    overloadRounds: 3,
    offeredToPeer: [1, 2],
    users: 20_000,
    largeUsers: 1_000_000,
    bufferPool: 10_240,
  },
} as const satisfies Record<string, Scale>;
