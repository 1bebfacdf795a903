import { status as Code, ServerInterceptingCall, type ServerInterceptor } from '@grpc/grpc-js';

/** More than a client asks that wants to know all there is; a client that does not read has us keep the answers. */
const STREAM_MESSAGES_MAX = 200;

/**
 * Ends unary calls whose message does not arrive in time, and streams of too many messages. grpc-js waits for the
 * former as long as the client likes, and every call that waits takes one of its connection's streams.
 */
export function bodyTimeout(timeoutMs: number): ServerInterceptor {
  return (method, call) => {
    if (method.requestStream) {
      let messages = 0;
      return new ServerInterceptingCall(call, {
        start: (next) =>
          next({
            onReceiveMessage: (message, proceed) => {
              if (++messages <= STREAM_MESSAGES_MAX) proceed(message);
              else {
                const details = `more than ${STREAM_MESSAGES_MAX} messages in one call`;
                call.sendStatus({ code: Code.RESOURCE_EXHAUSTED, details, metadata: null });
              }
            },
          }),
      });
    }
    let timer: NodeJS.Timeout | undefined;
    return new ServerInterceptingCall(call, {
      start: (next) => {
        timer = setTimeout(() => {
          call.sendStatus({
            code: Code.DEADLINE_EXCEEDED,
            details: 'the message did not arrive in time',
            metadata: null,
          });
        }, timeoutMs);
        next({
          onReceiveHalfClose: (proceed) => {
            clearTimeout(timer);
            proceed();
          },
          onCancel: () => clearTimeout(timer),
        });
      },
      sendStatus: (status, next) => {
        clearTimeout(timer);
        next(status);
      },
    });
  };
}
