/**
 * A TCP proxy in front of a database that understands as much of MySQL's protocol as is needed to do harm at a
 * chosen command: at the n-th statement of a transaction, and before, during or after its COMMIT.
 * https://dev.mysql.com/doc/dev/mysql-server/latest/PAGE_PROTOCOL.html
 */
import { once } from 'node:events';
import { createConnection, createServer, type Socket } from 'node:net';

/** A command on its way to the database. */
export interface Command {
  readonly kind: 'query' | 'prepare' | 'execute' | 'other';
  /** Of what is prepared or asked; of an execution the prepared statement's. */
  readonly sql: string;
  /** Whether its connection is one that never commits by itself. */
  readonly isTransactional: boolean;
  /** How many commands came since the transaction began, preparations not counted; the first one is 1. */
  readonly place: number;
  readonly isCommit: boolean;
}

/**
 * - `pass`: it goes through.
 * - `cut-before`: the connection is cut, and the command never arrives.
 * - `cut-during`: the command is sent, and the connection cut at once.
 * - `cut-after`: the database has carried it out, and its answer is lost.
 * - `late`: the sender's end is cut, and the command arrives some time after.
 * - `swallow`: the command vanishes, and the connection stays: what a black hole looks like.
 */
export type Fate = 'pass' | 'cut-before' | 'cut-during' | 'cut-after' | 'late' | 'swallow';

export interface WireProxy {
  readonly port: number;
  /** A database URL with the proxy in the place of its host. */
  through(databaseUrl: string): string;
  /** Asked about every command; absent: all pass. May put it off, which stalls that connection. */
  decide: ((command: Command) => Fate | Promise<Fate>) | undefined;
  /** Where new connections go to; those that exist stay. */
  target: { host: string; port: number };
  readonly connections: number;
  /** Cuts some connections; absent: all. @returns how many. */
  cut(choose?: (index: number) => boolean): number;
  /** Holds everything back in both directions, new connections included, until `resume`. */
  stall(): void;
  resume(): void;
  /** How many `late` commands have not arrived yet. */
  readonly underWay: number;
  close(): Promise<void>;
}

const HEADER_BYTES = 4;
const COM_QUERY = 0x03;
const COM_STMT_PREPARE = 0x16;
const COM_STMT_EXECUTE = 0x17;
const NO_ATTRIBUTES = Buffer.from([0, 1]);
const LATE_MS = 150;

/** Cuts a stream of bytes into MySQL's packets, headers included. */
class Packets {
  #rest: Buffer = Buffer.alloc(0);

  push(bytes: Buffer): Buffer[] {
    this.#rest = this.#rest.length === 0 ? bytes : Buffer.concat([this.#rest, bytes]);
    const packets: Buffer[] = [];
    while (this.#rest.length >= HEADER_BYTES) {
      const length = HEADER_BYTES + this.#rest.readUIntLE(0, 3);
      if (this.#rest.length < length) break;
      packets.push(this.#rest.subarray(0, length));
      this.#rest = this.#rest.subarray(length);
    }
    return packets;
  }
}

/** One connection through the proxy. */
class Link {
  readonly #client: Socket;
  readonly #database: Socket;
  readonly #fromClient = new Packets();
  readonly #prepared = new Map<number, string>();
  readonly #proxy: Inside;
  #preparing: string | undefined;
  #isTransactional = false;
  #place = 0;
  #losesAnswer = false;
  #isDetached = false;
  #queue = Promise.resolve();

  constructor(client: Socket, database: Socket, proxy: Inside) {
    this.#client = client;
    this.#database = database;
    this.#proxy = proxy;
    for (const socket of [client, database]) {
      socket.setNoDelay(true);
      socket.on('error', () => {});
    }
    client.on('close', () => {
      if (!this.#isDetached) this.cut();
    });
    database.on('close', () => this.cut());
    client.on('data', (bytes) => {
      for (const packet of this.#fromClient.push(bytes)) {
        this.#queue = this.#queue.then(() => this.#onPacket(packet));
      }
    });
    database.on('data', (bytes) => this.#onAnswer(bytes));
  }

  pause(): void {
    this.#client.pause();
    this.#database.pause();
  }

  resume(): void {
    this.#client.resume();
    this.#database.resume();
  }

  cut(): void {
    this.#client.destroy();
    this.#database.destroy();
    this.#proxy.links.delete(this);
  }

  async #onPacket(packet: Buffer): Promise<void> {
    // Whatever does not begin a sequence belongs to the log-in.
    if (packet[3] !== 0) return void this.#database.write(packet);
    const command = this.#read(packet);
    const fate = (await this.#proxy.decide?.(command)) ?? 'pass';
    switch (fate) {
      case 'pass':
        return void this.#database.write(packet);
      case 'cut-before':
        return this.cut();
      case 'cut-during':
        this.#losesAnswer = true;
        return void this.#database.write(packet, () => this.cut());
      case 'cut-after':
        this.#losesAnswer = true;
        return void this.#database.write(packet);
      case 'late':
        this.#isDetached = true;
        this.#losesAnswer = true;
        this.#proxy.underWay++;
        this.#client.destroy();
        setTimeout(() => {
          this.#proxy.underWay--;
          this.#database.write(packet);
        }, LATE_MS);
        return;
      case 'swallow':
        return;
    }
  }

  #read(packet: Buffer): Command {
    const text = () => {
      const body = packet.subarray(HEADER_BYTES + 1);
      // With CLIENT_QUERY_ATTRIBUTES, which MySQL 8.0.23 and newer offer, a query begins with their number: none.
      return body.subarray(body.indexOf(NO_ATTRIBUTES) === 0 ? NO_ATTRIBUTES.length : 0).toString();
    };
    const code = packet[HEADER_BYTES];
    let kind: Command['kind'] = 'other';
    let sql = '';
    if (code === COM_QUERY) {
      kind = 'query';
      sql = text();
      if (/autocommit = 0/.test(sql)) {
        this.#isTransactional = true;
        // The set-up of the connection is no part of a transaction.
        this.#place = -1;
      }
    } else if (code === COM_STMT_PREPARE) {
      kind = 'prepare';
      sql = text();
      this.#preparing = sql;
    } else if (code === COM_STMT_EXECUTE) {
      kind = 'execute';
      sql = this.#prepared.get(packet.readUInt32LE(HEADER_BYTES + 1)) ?? '';
    }
    if (kind === 'query' || kind === 'execute') this.#place++;
    const command: Command = {
      kind,
      sql,
      isTransactional: this.#isTransactional,
      place: kind === 'prepare' ? this.#place + 1 : this.#place,
      isCommit: sql === 'COMMIT',
    };
    if (sql === 'COMMIT' || sql === 'ROLLBACK') this.#place = 0;
    return command;
  }

  #onAnswer(bytes: Buffer): void {
    if (this.#losesAnswer) {
      this.cut();
      return;
    }
    // The answer to a preparation begins with the statement's number.
    if (this.#preparing !== undefined && bytes.length >= HEADER_BYTES + 5) {
      if (bytes[HEADER_BYTES] === 0)
        this.#prepared.set(bytes.readUInt32LE(HEADER_BYTES + 1), this.#preparing);
      this.#preparing = undefined;
    }
    this.#client.write(bytes);
  }
}

interface Inside {
  readonly links: Set<Link>;
  decide: WireProxy['decide'];
  underWay: number;
}

export async function startWireProxy(databaseUrl: string): Promise<WireProxy> {
  const inside: Inside = { links: new Set(), decide: undefined, underWay: 0 };
  const { hostname, port: databasePort } = new URL(databaseUrl);
  let target = { host: hostname, port: Number(databasePort) };
  let isStalled = false;
  const server = createServer((client) => {
    const link = new Link(client, createConnection(target), inside);
    inside.links.add(link);
    if (isStalled) link.pause();
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as { port: number };
  const proxy: WireProxy = {
    port,
    through: (url) => {
      const through = new URL(url);
      through.host = `127.0.0.1:${port}`;
      return through.href;
    },
    get decide() {
      return inside.decide;
    },
    set decide(decide) {
      inside.decide = decide;
    },
    get target() {
      return target;
    },
    set target(next) {
      target = next;
    },
    get connections() {
      return inside.links.size;
    },
    get underWay() {
      return inside.underWay;
    },
    cut: (choose = () => true) => {
      const chosen = [...inside.links].filter((_, index) => choose(index));
      for (const link of chosen) link.cut();
      return chosen.length;
    },
    stall: () => {
      isStalled = true;
      for (const link of inside.links) link.pause();
    },
    resume: () => {
      isStalled = false;
      for (const link of inside.links) link.resume();
    },
    close: async () => {
      proxy.cut();
      await new Promise((resolve) => server.close(resolve));
    },
  };
  return proxy;
}
