import { status as Code, ServerInterceptingCall, type ServerInterceptor } from '@grpc/grpc-js';

/**
 * Ends unary calls whose message does not arrive in time. grpc-js waits for it as long as the client likes, and
 * every call that waits takes one of its connection's streams.
 */
export function bodyTimeout(timeoutMs: number): ServerInterceptor {
  return (method, call) => {
    if (method.requestStream) return new ServerInterceptingCall(call);
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
