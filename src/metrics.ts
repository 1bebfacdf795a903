import { createServer, type Server } from 'node:http';
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client';
import type { Phase } from './call.ts';
import type { Slots } from './password/slots.ts';

/** Seconds; a hash takes some 15 ms, and nobody waits for longer than the last one. */
const SECONDS_BUCKETS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10];

/** What is counted, for Prometheus. Labels hold no more than the closed sets of methods, codes and reasons. */
export interface Metrics {
  readonly registry: Registry;
  called(
    method: string,
    code: string,
    reason: string,
    seconds: number,
    spentMs: Readonly<Record<Phase, number>>,
  ): void;
}

export function createMetrics(slots: Slots): Metrics {
  const registry = new Registry();
  const registers = [registry];
  collectDefaultMetrics({ register: registry });
  const calls = new Counter({
    name: 'rekey_calls_total',
    help: 'Calls by method, gRPC status code and reason',
    labelNames: ['method', 'code', 'reason'],
    registers,
  });
  const duration = new Histogram({
    name: 'rekey_call_seconds',
    help: 'Time a call took, from its message to its status',
    labelNames: ['method'],
    buckets: SECONDS_BUCKETS,
    registers,
  });
  const phases = new Histogram({
    name: 'rekey_call_phase_seconds',
    help: "Where a call's time went: queue, hash, database",
    labelNames: ['phase'],
    buckets: SECONDS_BUCKETS,
    registers,
  });
  new Gauge({
    name: 'rekey_hash_slots_taken',
    help: 'Calls that hash now',
    registers,
    collect() {
      this.set(slots.taken);
    },
  });
  new Gauge({
    name: 'rekey_hash_queue_length',
    help: 'Calls that wait for a slot to hash in',
    registers,
    collect() {
      this.set(slots.waiting);
    },
  });
  return {
    registry,
    called(method, code, reason, seconds, spentMs) {
      calls.inc({ method, code, reason });
      duration.observe({ method }, seconds);
      for (const [phase, ms] of Object.entries(spentMs)) if (ms > 0) phases.observe({ phase }, ms / 1000);
    },
  };
}

/** Serves `GET /metrics` on `listen` (host:port). */
export async function serveMetrics(registry: Registry, listen: string): Promise<Server> {
  const separator = listen.lastIndexOf(':');
  const server = createServer(async (request, response) => {
    if (request.method !== 'GET' || request.url !== '/metrics') {
      response.writeHead(404).end();
      return;
    }
    response.writeHead(200, { 'content-type': registry.contentType }).end(await registry.metrics());
  });
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(
      Number(listen.slice(separator + 1)),
      listen.slice(0, separator).replace(/^\[|\]$/g, ''),
      resolve,
    );
  });
  return server;
}
