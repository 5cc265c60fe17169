package notecase

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	notecasev1 "notecase.dev/api/notecase/v1"
)

// Error is a refusal or failure of the service, or a failure to reach it.
type Error struct {
	// Code is always set.
	Code codes.Code
	// Reason is for programs to check: a notecasev1.ErrorReason without its prefix, such as "RUN_ACTIVE". It is empty if
	// the error does not come from the service: the connection broke, the deadline passed, or something else answered.
	Reason string
	// Message is for people.
	Message string
	// Metadata has data for programs, such as the current version.
	Metadata map[string]string
	// Violations are all invalid fields of the request.
	Violations []*errdetails.BadRequest_FieldViolation
	// Resource is the resource that the error is about, or nil.
	Resource *errdetails.ResourceInfo
	// RetryAfter is how long to wait before the next try; 0 if the service names no time.
	RetryAfter time.Duration

	tls    tlsFault
	status *status.Status // of the call, if it is a call's error
	ofRun  bool           // the end of a run, or the refusal of a command: no connection broke
	local  bool           // it failed before it was sent
}

// tlsFault says whether only one of the two sides uses TLS, or the certificate is not trusted.
type tlsFault int

const (
	tlsFine tlsFault = iota
	// tlsSuspected: the server closed the connection before HTTP/2 began. One that uses TLS does so to a client that does not;
	// so does a proxy whose server is away.
	tlsSuspected
	// tlsFailed: the handshake failed.
	tlsFailed
)

const (
	tlsHint         = " (does the server use TLS? see NOTECASE_CA)"
	certificateHint = " (does NOTECASE_CA name the CA of the server's certificate?)"
)

// Error returns the message with the reason, or else the code. The code UNKNOWN says nothing and is left out.
func (e *Error) Error() string {
	if e.Reason != "" {
		return e.Reason + ": " + e.Message
	}
	if e.Code == codes.Unknown {
		return e.Message
	}
	return e.Code.String() + ": " + e.Message
}

// GRPCStatus returns the status of the call with all its details, for status.FromError and status.Code.
func (e *Error) GRPCStatus() *status.Status {
	if e.status != nil {
		return e.status
	}
	return status.New(e.Code, e.Message)
}

// AsError returns the *Error in an error of a call or a Stream, and converts one of a connection that Dial did not make. It returns nil for nil, and the code UNKNOWN for an error that is
// not gRPC's.
func AsError(err error) *Error {
	if err == nil {
		return nil
	}
	if known, ok := errors.AsType[*Error](err); ok {
		return known
	}
	told, ofCall := status.FromError(err)
	if !ofCall {
		told = status.FromContextError(err)
	}
	read := &Error{Code: told.Code(), Message: told.Message(), status: told}
	read.local = !ofCall || isUnsent(told.Message())
	read.tls = tlsFaultIn(told.Message())
	if strings.Contains(told.Message(), " x509: ") {
		read.Message += certificateHint
	} else if read.tls != tlsFine {
		read.Message += tlsHint
	}
	for _, detail := range told.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.Domain == "notecase.dev" {
				read.Reason, read.Metadata = detail.Reason, detail.Metadata
			}
		case *errdetails.BadRequest:
			read.Violations = detail.FieldViolations
		case *errdetails.ResourceInfo:
			read.Resource = detail
		case *errdetails.RetryInfo:
			read.RetryAfter = detail.RetryDelay.AsDuration()
		}
	}
	return read
}

// isUnsent reports whether a message of grpc-go says that the request never left the program: it cannot be serialized,
// or its metadata cannot be sent.
func isUnsent(message string) bool {
	for _, begin := range []string{"grpc: error while marshaling", "header key "} {
		if strings.HasPrefix(message, begin) {
			return true
		}
	}
	return false
}

// tlsFaultIn reads a message of grpc-go, which has no code for a failed handshake.
func tlsFaultIn(message string) tlsFault {
	switch {
	case strings.Contains(message, "handshake failed: tls: "), strings.Contains(message, "handshake failed: remote error: tls: "):
		return tlsFailed
	case strings.Contains(message, "error reading server preface: "):
		return tlsSuspected
	}
	return tlsFine
}

// FromProto converts the error of a failed run or of a refused command. It returns nil for nil.
func FromProto(err *notecasev1.Error) *Error {
	if err == nil {
		return nil
	}
	read := &Error{Code: codes.Code(err.GetCode()), Message: err.GetMessage(), Metadata: err.GetMetadata(), ofRun: true}
	if err.GetReason() != notecasev1.ErrorReason_ERROR_REASON_UNSPECIFIED {
		read.Reason = strings.TrimPrefix(err.GetReason().String(), "ERROR_REASON_")
	}
	return read
}

// MayPass reports whether the same call may succeed later: the service was unavailable, or the connection broke. It is
// false after a failed TLS handshake, for a cancelled run, and for what failed before it was sent.
func (e *Error) MayPass() bool {
	if e.tls == tlsFailed {
		return false
	}
	switch e.Code {
	case codes.Unavailable:
		return true
	case codes.Canceled, codes.Internal, codes.Unknown: // what a connection that was reset looks like
		return e.Reason == "" && !e.ofRun && !e.local
	}
	return false
}

// Backoff configures retries of a failed call. Zero fields have the defaults, which outlast a restart of the server:
// about 20 seconds in all. A server that closes new connections at once is tried for only about 5 seconds, since it may
// require TLS.
type Backoff struct {
	// Tries is the number of retries in a row (10); negative: none.
	Tries int
	// First is the first delay (100 ms). Each further one is twice as long.
	First time.Duration
	// Max is the longest delay (5 s).
	Max time.Duration
}

// Repeat retries a call after transient errors. The call must be safe to repeat: a read, or a write with a request_id
// or command_id that stays the same. It returns an *Error, or the context's error when the context is done.
func (b Backoff) Repeat(ctx context.Context, call func(context.Context) error) error {
	begun := time.Now()
	for failures := 0; ; {
		err := call(ctx)
		if err == nil {
			return nil
		}
		told := AsError(err)
		if err = b.wait(ctx, failures, told, false); err != nil {
			return err
		}
		if !told.isDraining(begun) {
			failures++
		}
	}
}

// drainTime is how long a server that stops is waited for: its runs may take as long as its grace, and then it is
// replaced. Meanwhile a refusal is no failure.
const drainTime = time.Minute

func (e *Error) isDraining(begun time.Time) bool {
	return e.Reason == "SERVER_DRAINING" && time.Since(begun) < drainTime
}

// wait returns nil when it is time for the next try, and the error when there should be none.
func (b Backoff) wait(ctx context.Context, failures int, err *Error, worth bool) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	tries := or(b.Tries, 10)
	if err.tls == tlsSuspected && !worth {
		tries = min(tries, 6)
	}
	if failures >= tries || !worth && !err.MayPass() {
		return err
	}
	delay := min(or(b.First, 100*time.Millisecond)<<min(failures, 20), or(b.Max, 5*time.Second))
	delay = delay/2 + rand.N(delay/2+1) // the clients of a server that restarts do not come back all at once
	timer := time.NewTimer(max(delay, err.RetryAfter))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func or[T comparable](value, otherwise T) T {
	var zero T
	if value == zero {
		return otherwise
	}
	return value
}

// unaryErrors makes the calls of a connection return *Error.
func unaryErrors(
	ctx context.Context, method string, request, response any, connection *grpc.ClientConn, call grpc.UnaryInvoker, options ...grpc.CallOption,
) error {
	return converted(call(ctx, method, request, response, connection, options...))
}

// streamErrors makes the streams of a connection return *Error.
func streamErrors(
	ctx context.Context, description *grpc.StreamDesc, connection *grpc.ClientConn, method string, open grpc.Streamer, options ...grpc.CallOption,
) (grpc.ClientStream, error) {
	stream, err := open(ctx, description, connection, method, options...)
	if err != nil {
		return nil, converted(err)
	}
	return &convertingStream{stream}, nil
}

type convertingStream struct{ grpc.ClientStream }

func (s *convertingStream) Header() (metadata.MD, error) {
	header, err := s.ClientStream.Header()
	return header, converted(err)
}

func (s *convertingStream) CloseSend() error { return converted(s.ClientStream.CloseSend()) }

func (s *convertingStream) SendMsg(message any) error {
	return converted(s.ClientStream.SendMsg(message))
}

func (s *convertingStream) RecvMsg(message any) error {
	return converted(s.ClientStream.RecvMsg(message))
}

// converted returns nil and io.EOF, which ends a stream, as they are.
func converted(err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return AsError(err)
}
