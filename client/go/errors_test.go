package notecase

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	notecasev1 "notecase.dev/api/notecase/v1"
)

func TestAnErrorHasWhatItsDetailsSay(t *testing.T) {
	told, err := status.New(codes.Unavailable, "The server is stopping.").WithDetails(
		&errdetails.ErrorInfo{Domain: "notecase.dev", Reason: "SERVER_DRAINING", Metadata: map[string]string{"a": "b"}},
		&errdetails.RetryInfo{RetryDelay: durationpb.New(2 * time.Second)},
	)
	if err != nil {
		t.Fatal(err)
	}
	read := AsError(told.Err())
	if read.Reason != "SERVER_DRAINING" || read.RetryAfter != 2*time.Second || read.Metadata["a"] != "b" || !read.MayPass() {
		t.Errorf("%+v", read)
	}
	if read.Error() != "SERVER_DRAINING: The server is stopping." {
		t.Error(read.Error())
	}
}

func TestAFailedRunsErrorHasItsReason(t *testing.T) {
	failed := &notecasev1.Error{Code: 13, Reason: notecasev1.ErrorReason_ERROR_REASON_MODEL_ERROR, Message: "No such model."}
	if read := FromProto(failed); read.Reason != "MODEL_ERROR" || read.Code != codes.Internal || read.MayPass() {
		t.Errorf("%+v", read)
	}
	if read := FromProto(nil); read != nil {
		t.Errorf("%+v", read)
	}
}

func TestACallIsRepeatedWhileItMayPass(t *testing.T) {
	backoff := Backoff{First: time.Microsecond, Tries: 3}
	count := func(ctx context.Context, err error) (calls int, last error) {
		last = backoff.Repeat(ctx, func(context.Context) error { calls++; return err })
		return calls, last
	}
	if calls, err := count(t.Context(), status.Error(codes.Unavailable, "away")); calls != 4 || AsError(err).Message != "away" {
		t.Error(calls, err)
	}
	if calls, err := count(t.Context(), status.Error(codes.NotFound, "gone")); calls != 1 || AsError(err).Code != codes.NotFound {
		t.Error(calls, err)
	}
	if calls, err := count(t.Context(), unsuccessful("sessions/s/runs/r", notecasev1.Run_STATE_CANCELLED, nil)); calls != 1 || AsError(err).Code != codes.Canceled {
		t.Error(calls, err)
	}
	if calls, err := count(t.Context(), nil); calls != 1 || err != nil {
		t.Error(calls, err)
	}
	done, cancel := context.WithCancel(t.Context())
	cancel()
	if calls, err := count(done, status.Error(codes.Unavailable, "away")); calls != 1 || !errors.Is(err, context.Canceled) {
		t.Error(calls, err)
	}
}

func TestACallReturnsAnErrorWithItsStatus(t *testing.T) {
	refused, err := status.New(codes.NotFound, "gone").WithDetails(&errdetails.ErrorInfo{Domain: "notecase.dev", Reason: "RUN_NOT_FOUND"})
	if err != nil {
		t.Fatal(err)
	}
	service := &scripted{scripts: [][]*notecasev1.Event{{}, {}}, ends: []error{refused.Err(), nil}, refusal: refused.Err()}
	runs := notecasev1.NewRunServiceClient(serve(t, service, Options{}))
	_, unary := runs.GetRun(t.Context(), &notecasev1.GetRunRequest{})
	read := func() (last error) {
		stream, err := runs.WatchEvents(t.Context(), &notecasev1.WatchEventsRequest{})
		for err == nil {
			_, err = stream.Recv()
		}
		return err
	}
	for name, err := range map[string]error{"unary": unary, "stream": read()} {
		known, ok := errors.AsType[*Error](err)
		if !ok || known.Reason != "RUN_NOT_FOUND" || err.Error() != "RUN_NOT_FOUND: gone" {
			t.Error(name, err)
		}
		if told, ok := status.FromError(err); !ok || told.Code() != codes.NotFound || len(told.Details()) != 1 {
			t.Error(name, told)
		}
	}
	if err := read(); err != io.EOF {
		t.Error("the end of a stream", err)
	}
}

func TestAnErrorThatIsNotOfACallHasNoCodeInItsText(t *testing.T) {
	if told := AsError(errors.New("notecase: no file")).Error(); told != "notecase: no file" {
		t.Error(told)
	}
}
