package notecase

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	notecasev1 "notecase.dev/api/notecase/v1"
)

// scripted plays one script for each call of WatchEvents, and keeps what the calls asked for and with which token.
type scripted struct {
	notecasev1.UnimplementedRunServiceServer
	scripts [][]*notecasev1.Event // events, in one batch
	ends    []error               // how each script ends
	after   []int64
	tokens  []string
	uids    []string
	starts  []*notecasev1.CreateRunRequest
	waiting []*notecasev1.ToolCall // the run's pending calls
	state   notecasev1.Run_State   // the run's state when a stream attaches
	refusal error                  // of GetRun
}

func (s *scripted) CreateRun(_ context.Context, request *notecasev1.CreateRunRequest) (*notecasev1.Run, error) {
	s.starts = append(s.starts, request)
	if len(s.starts) == 1 {
		return nil, status.Error(codes.Unavailable, "away")
	}
	return &notecasev1.Run{Name: "sessions/s/runs/r", FirstSequence: 1}, nil
}

func (s *scripted) GetRun(context.Context, *notecasev1.GetRunRequest) (*notecasev1.Run, error) {
	return &notecasev1.Run{}, s.refusal
}

func (s *scripted) WatchEvents(request *notecasev1.WatchEventsRequest, stream notecasev1.RunService_WatchEventsServer) error {
	number := len(s.after)
	s.after = append(s.after, request.GetAfterSequence())
	s.uids = append(s.uids, request.IfSessionUid)
	found, _ := metadata.FromIncomingContext(stream.Context())
	s.tokens = append(s.tokens, strings.Join(found.Get("authorization"), " "))
	if number >= len(s.scripts) {
		return status.Error(codes.FailedPrecondition, "one call too many")
	}
	run := &notecasev1.Run{Name: "sessions/s/runs/r", PendingCalls: s.waiting, State: s.state}
	attached := &notecasev1.Attached{Session: "sessions/s", SessionUid: "uid", Run: run, LastSequence: 2}
	batch := &notecasev1.EventBatch{Events: s.scripts[number]}
	for _, frame := range []*notecasev1.RunResponse{
		{Frame: &notecasev1.RunResponse_Attached{Attached: attached}}, {Frame: &notecasev1.RunResponse_Batch{Batch: batch}},
	} {
		if err := stream.Send(frame); err != nil {
			return err
		}
	}
	return s.ends[number]
}

// serve returns a connection to the server on a loopback port.
func serve(t *testing.T, service *scripted, options Options) *grpc.ClientConn {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	notecasev1.RegisterRunServiceServer(server, service)
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	connection, err := Dial(listener.Addr().String(), options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { connection.Close() })
	return connection
}

func event(sequence int64) *notecasev1.Event {
	return &notecasev1.Event{Sequence: sequence, Payload: &notecasev1.Event_Usage{Usage: &notecasev1.Usage{}}}
}

func delta(start int64, text string) *notecasev1.Event {
	delta := &notecasev1.BlockDelta{
		Message: "sessions/s/messages/a", Start: start, End: start + int64(len(text)),
		Delta: &notecasev1.BlockDelta_Text{Text: text},
	}
	return &notecasev1.Event{Run: "sessions/s/runs/r", Payload: &notecasev1.Event_BlockDelta{BlockDelta: delta}}
}

// sequences follows a stream to its end; the error is that of the last pair.
func sequences(t *testing.T, stream *Stream) (found []int64, last error) {
	stream.Backoff.First = time.Millisecond
	for event, err := range stream.Events(t.Context()) {
		if last = err; err == nil {
			found = append(found, event.Sequence)
		}
	}
	return found, last
}

func TestATextGoesOnAfterTheLastEvent(t *testing.T) {
	service := &scripted{
		scripts: [][]*notecasev1.Event{{event(1), event(2), delta(0, "Grü")}, {delta(0, "Grüße"), delta(7, "!"), event(3)}},
		ends:    []error{status.Error(codes.Unavailable, "cut"), nil},
	}
	stream, err := Start(t.Context(), serve(t, service, Options{}), &notecasev1.StartRun{})
	if err != nil {
		t.Fatal(err)
	}
	said := ""
	for text, err := range stream.Text(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		said += text
	}
	if said != "Grüße!" || !slices.Equal(service.after, []int64{0, 2}) || stream.View.LastSequence != 3 {
		t.Error(said, service.after, stream.View.LastSequence)
	}
	if len(service.starts) != 2 || service.starts[0].RequestId == "" || service.starts[0].RequestId != service.starts[1].RequestId {
		t.Error("a start that is repeated has the request id of the first", service.starts)
	}
}

func TestATextHasOnlyTheWordsOfItsRun(t *testing.T) {
	other := delta(0, "Not mine.")
	other.Run, other.GetBlockDelta().Message = "sessions/s/runs/before", "sessions/s/messages/before"
	for name, expected := range map[string]string{"sessions/s/runs/r": "Mine.", "sessions/s": "Not mine.\n\nMine."} {
		service := &scripted{scripts: [][]*notecasev1.Event{{other, delta(0, "Mine.")}}, ends: []error{nil}}
		said := ""
		for text, err := range Watch(serve(t, service, Options{}), &notecasev1.WatchEventsRequest{Name: name}).Text(t.Context()) {
			if err != nil {
				t.Fatal(err)
			}
			said += text
		}
		if said != expected {
			t.Error(name, said)
		}
	}
}

func TestAStreamAttachesAgainToTheSameSession(t *testing.T) {
	cut := status.Error(codes.Unavailable, "cut")
	service := &scripted{scripts: [][]*notecasev1.Event{{event(1)}, {event(2)}}, ends: []error{cut, nil}}
	found, err := sequences(t, Watch(serve(t, service, Options{}), &notecasev1.WatchEventsRequest{Name: "sessions/s/runs/r"}))
	if err != nil || !slices.Equal(found, []int64{1, 2}) || !slices.Equal(service.uids, []string{"", "uid"}) {
		t.Error(found, err, service.uids)
	}
}

func TestAReaderThatWasTooSlowAttachesAgain(t *testing.T) {
	slow := refused(t, codes.ResourceExhausted, "WATCHER_TOO_SLOW", time.Millisecond)
	full := status.Error(codes.ResourceExhausted, "too many pending requests")
	quota := refused(t, codes.ResourceExhausted, "QUOTA_EXCEEDED", 0)
	service := &scripted{
		scripts: [][]*notecasev1.Event{{event(1)}, {event(2)}, {event(3)}},
		ends:    []error{slow, full, quota},
	}
	found, err := sequences(t, Watch(serve(t, service, Options{}), &notecasev1.WatchEventsRequest{Name: "sessions/s/runs/r"}))
	if !slices.Equal(found, []int64{1, 2, 3}) || AsError(err).Reason != "QUOTA_EXCEEDED" {
		t.Error(found, err)
	}
}

func TestATextWithoutDeltasHasTheMessages(t *testing.T) {
	parts := []*notecasev1.Part{{Kind: &notecasev1.Part_Text{Text: "Hello there."}}}
	message := &notecasev1.Message{Name: "sessions/s/messages/a", Role: notecasev1.Message_ROLE_ASSISTANT, Parts: parts}
	added := &notecasev1.Event{
		Sequence: 3, Run: "sessions/s/runs/r", Payload: &notecasev1.Event_MessageAdded{MessageAdded: message},
	}
	for _, deltas := range [][]*notecasev1.Event{nil, {delta(0, "Hello")}, {delta(0, "Hello"), delta(5, " there.")}} {
		events := append(append([]*notecasev1.Event{event(1), event(2)}, deltas...), added)
		service := &scripted{scripts: [][]*notecasev1.Event{events}, ends: []error{nil}}
		stream, said := Watch(serve(t, service, Options{}), &notecasev1.WatchEventsRequest{Name: "sessions/s/runs/r"}), ""
		for text, err := range stream.Text(t.Context()) {
			if err != nil {
				t.Fatal(err)
			}
			said += text
		}
		if said != "Hello there." {
			t.Errorf("%q", said)
		}
	}
}

// refused returns the error of a refusal by the service.
func refused(t *testing.T, code codes.Code, reason string, after time.Duration) error {
	details := []protoadapt.MessageV1{&errdetails.ErrorInfo{Domain: "notecase.dev", Reason: reason}}
	if after > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(after)})
	}
	told, err := status.New(code, "no").WithDetails(details...)
	if err != nil {
		t.Fatal(err)
	}
	return told.Err()
}

func TestAMistakeOfTheProgramIsNotRepeated(t *testing.T) {
	bad := func(context.Context) (string, error) { return "two\nlines", nil }
	for name, call := range map[string]func(context.Context, notecasev1.RunServiceClient) error{
		"its own error": func(context.Context, notecasev1.RunServiceClient) error { return errors.New("local") },
		"no UTF-8": func(ctx context.Context, runs notecasev1.RunServiceClient) error {
			_, err := runs.GetRun(ctx, &notecasev1.GetRunRequest{Name: "\xff"})
			return err
		},
		"no token": func(ctx context.Context, _ notecasev1.RunServiceClient) error {
			_, err := notecasev1.NewRunServiceClient(serve(t, &scripted{}, Options{Token: bad})).GetRun(ctx, &notecasev1.GetRunRequest{})
			return err
		},
	} {
		calls, runs := 0, notecasev1.NewRunServiceClient(serve(t, &scripted{}, Options{}))
		err := Backoff{First: time.Millisecond}.Repeat(t.Context(), func(ctx context.Context) error {
			calls++
			return call(ctx, runs)
		})
		if err == nil || calls != 1 || strings.Contains(err.Error(), "lines") {
			t.Error(name, calls, err)
		}
	}
}

func TestAFunctionWithoutATokenIsAskedAgain(t *testing.T) {
	asked := 0
	away := func(context.Context) (string, error) {
		if asked++; asked < 3 {
			return "", errors.New("away")
		}
		return "token", nil
	}
	runs := notecasev1.NewRunServiceClient(serve(t, &scripted{}, Options{Token: away}))
	err := Backoff{First: time.Millisecond}.Repeat(t.Context(), func(ctx context.Context) error {
		_, err := runs.GetRun(ctx, &notecasev1.GetRunRequest{})
		return err
	})
	if err != nil || asked != 3 {
		t.Error(asked, err)
	}
}

func TestAServerThatStopsIsWaitedForLongerThanAFailure(t *testing.T) {
	left, draining := 5, refused(t, codes.Unavailable, "SERVER_DRAINING", 0)
	err := Backoff{Tries: 1, First: time.Millisecond}.Repeat(t.Context(), func(context.Context) error {
		if left--; left >= 0 {
			return draining
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestAGapIsAskedForAgain(t *testing.T) {
	service := &scripted{scripts: [][]*notecasev1.Event{{event(1), event(3)}, {event(2), event(3)}}, ends: []error{nil, nil}}
	stream := Watch(serve(t, service, Options{}), &notecasev1.WatchEventsRequest{Name: "sessions/s/runs/r"})
	if found, err := sequences(t, stream); err != nil || !slices.Equal(found, []int64{1, 2, 3}) {
		t.Error(found, err)
	}
	if !slices.Equal(service.after, []int64{0, 1}) {
		t.Error(service.after)
	}
}

func TestATokenThatExpiredIsAskedForOnceMore(t *testing.T) {
	expired := status.Error(codes.Unauthenticated, "The token has expired.")
	service := &scripted{scripts: [][]*notecasev1.Event{{event(1)}, {event(2)}, {}, {}}, ends: []error{expired, expired, expired, expired}}
	asked := 0
	token := func(context.Context) (string, error) {
		asked++
		return fmt.Sprint("token-", asked), nil
	}
	stream := Watch(serve(t, service, Options{Token: token}), &notecasev1.WatchEventsRequest{Name: "sessions/s/runs/r"})
	found, err := sequences(t, stream)
	if AsError(err).Code != codes.Unauthenticated || !slices.Equal(found, []int64{1, 2}) {
		t.Error(found, err)
	}
	if !slices.Equal(service.tokens, []string{"Bearer token-1", "Bearer token-2", "Bearer token-3"}) {
		t.Error(service.tokens)
	}
}

func TestARefusalEndsTheStreamAtOnce(t *testing.T) {
	service := &scripted{scripts: [][]*notecasev1.Event{{}}, ends: []error{status.Error(codes.NotFound, "gone")}}
	stream := Watch(serve(t, service, Options{}), &notecasev1.WatchEventsRequest{Name: "sessions/s"})
	if found, err := sequences(t, stream); AsError(err).Code != codes.NotFound || len(found) != 0 || len(service.after) != 1 {
		t.Error(found, err, service.after)
	}
}

func TestAContextThatIsDoneEndsTheStream(t *testing.T) {
	service := &scripted{scripts: [][]*notecasev1.Event{{event(1)}}, ends: []error{status.Error(codes.Unavailable, "away")}}
	stream := Watch(serve(t, service, Options{}), &notecasev1.WatchEventsRequest{Name: "sessions/s/runs/r"})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var last error
	for _, err := range stream.Events(ctx) {
		last = err
		cancel()
	}
	if !errors.Is(last, context.Canceled) {
		t.Error(last)
	}
}

func TestAFailedRunEndsItsText(t *testing.T) {
	failure := &notecasev1.Error{Code: 13, Reason: notecasev1.ErrorReason_ERROR_REASON_MODEL_ERROR, Message: "No such model."}
	change := &notecasev1.RunStateChanged{State: notecasev1.Run_STATE_FAILED, Error: failure}
	failed := &notecasev1.Event{Sequence: 1, Run: "sessions/s/runs/r", Payload: &notecasev1.Event_RunStateChanged{RunStateChanged: change}}
	service := &scripted{scripts: [][]*notecasev1.Event{{failed}}, ends: []error{nil}}
	stream := Watch(serve(t, service, Options{}), &notecasev1.WatchEventsRequest{Name: "sessions/s/runs/r"})
	var last error
	for _, err := range stream.Text(t.Context()) {
		last = err
	}
	if AsError(last).Reason != "MODEL_ERROR" {
		t.Error(last)
	}
}

func TestAStreamTellsOfEachAttachmentBeforeItsEvents(t *testing.T) {
	service := &scripted{
		scripts: [][]*notecasev1.Event{{event(1)}, {}},
		ends:    []error{status.Error(codes.Unavailable, "cut"), nil},
		waiting: []*notecasev1.ToolCall{{CallId: "call-1"}},
	}
	stream := Watch(serve(t, service, Options{}), &notecasev1.WatchEventsRequest{Name: "sessions/s/runs/r"})
	stream.Backoff.First = time.Millisecond
	var order []string
	stream.OnAttached = func(attached *notecasev1.Attached) {
		order = append(order, attached.Run.PendingCalls[0].CallId)
	}
	for event, err := range stream.Events(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		order = append(order, fmt.Sprint(event.Sequence))
	}
	if !slices.Equal(order, []string{"call-1", "1", "call-1"}) {
		t.Error(order)
	}
}

func TestACancelledRunEndsItsTextWithAnError(t *testing.T) {
	change := &notecasev1.RunStateChanged{State: notecasev1.Run_STATE_CANCELLED}
	cancelled := &notecasev1.Event{Sequence: 1, Run: "sessions/s/runs/r", Payload: &notecasev1.Event_RunStateChanged{RunStateChanged: change}}
	for name, service := range map[string]*scripted{
		"during the stream": {scripts: [][]*notecasev1.Event{{delta(0, "Half"), cancelled}}, ends: []error{nil}},
		"before it":         {scripts: [][]*notecasev1.Event{{}}, ends: []error{nil}, state: notecasev1.Run_STATE_CANCELLED},
	} {
		stream := Watch(serve(t, service, Options{}), &notecasev1.WatchEventsRequest{Name: "sessions/s/runs/r"})
		var last error
		for _, err := range stream.Text(t.Context()) {
			last = err
		}
		if err := AsError(last); err == nil || err.MayPass() || err.Code != codes.Canceled || err.Message != "sessions/s/runs/r was cancelled." {
			t.Error(name, last)
		}
	}
}

func TestTheTextOfASessionGoesOnAfterACancelledRun(t *testing.T) {
	change := &notecasev1.RunStateChanged{State: notecasev1.Run_STATE_CANCELLED}
	cancelled := &notecasev1.Event{Sequence: 3, Run: "sessions/s/runs/r", Payload: &notecasev1.Event_RunStateChanged{RunStateChanged: change}}
	service := &scripted{
		scripts: [][]*notecasev1.Event{{cancelled, delta(0, "Next.")}}, ends: []error{nil}, state: notecasev1.Run_STATE_CANCELLED,
	}
	said := ""
	for text, err := range Watch(serve(t, service, Options{}), &notecasev1.WatchEventsRequest{Name: "sessions/s"}).Text(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		said += text
	}
	if said != "Next." {
		t.Error(said)
	}
}

func TestAStreamHasItsRunBeforeItIsFollowed(t *testing.T) {
	service := &scripted{scripts: [][]*notecasev1.Event{{event(1)}}, ends: []error{nil}}
	stream, err := Start(t.Context(), serve(t, service, Options{}), &notecasev1.StartRun{})
	if err != nil {
		t.Fatal(err)
	}
	if stream.Attached.GetSession() != "sessions/s" || stream.Attached.GetRun().GetName() != "sessions/s/runs/r" {
		t.Error(stream.Attached)
	}
	if found, err := sequences(t, stream); err != nil || !slices.Equal(found, []int64{1}) {
		t.Error(found, err)
	}
}

func TestATextGoesOnAfterADelta(t *testing.T) {
	before := event(1)
	before.Run = "sessions/s/runs/r"
	before.Payload = &notecasev1.Event_MessageAdded{MessageAdded: &notecasev1.Message{
		Name: "sessions/s/messages/a", Role: notecasev1.Message_ROLE_ASSISTANT, Parts: []*notecasev1.Part{
			{Kind: &notecasev1.Part_Text{Text: "Shown. "}}, {Kind: &notecasev1.Part_Text{Text: "Grüße"}},
		},
	}}
	second := delta(0, "Grüße")
	second.GetBlockDelta().Block = 1
	for name, events := range map[string][]*notecasev1.Event{"unfinished": {delta(0, "Shown. "), second}, "whole": {before}} {
		service := &scripted{scripts: [][]*notecasev1.Event{events}, ends: []error{nil}}
		stream := Watch(serve(t, service, Options{}), &notecasev1.WatchEventsRequest{Name: "sessions/s/runs/r"})
		stream.After = &notecasev1.BlockDelta{Message: "sessions/s/messages/a", Block: 1, End: int64(len("Grü"))}
		said := ""
		for text, err := range stream.Text(t.Context()) {
			if err != nil {
				t.Fatal(err)
			}
			said += text
		}
		if said != "ße" {
			t.Error(name, said)
		}
	}
}

func added(sequence int64, message, text string) *notecasev1.Event {
	return &notecasev1.Event{Sequence: sequence, Run: "sessions/s/runs/r", Payload: &notecasev1.Event_MessageAdded{MessageAdded: &notecasev1.Message{
		Name: "sessions/s/messages/" + message, Role: notecasev1.Message_ROLE_ASSISTANT,
		Parts: []*notecasev1.Part{{Kind: &notecasev1.Part_Text{Text: text}}},
	}}}
}

func TestATextAfterADeltaLeavesOutTheMessagesBefore(t *testing.T) {
	for name, c := range map[string]struct {
		events   []*notecasev1.Event
		expected string
	}{
		"unfinished": {[]*notecasev1.Event{added(1, "one", "One."), event(2), delta(0, "Grüße")}, "ße"},
		"whole":      {[]*notecasev1.Event{added(1, "one", "One."), added(2, "a", "Grüße")}, "ße"},
		"gone":       {[]*notecasev1.Event{added(1, "one", "One."), event(2), added(3, "two", "")}, "\n\nOne."},
		"not there":  {[]*notecasev1.Event{added(1, "one", "One.")}, "\n\nOne."},
	} {
		service := &scripted{scripts: [][]*notecasev1.Event{c.events}, ends: []error{nil}, state: notecasev1.Run_STATE_RUNNING}
		stream := Watch(serve(t, service, Options{}), &notecasev1.WatchEventsRequest{Name: "sessions/s/runs/r"})
		stream.After = &notecasev1.BlockDelta{Message: "sessions/s/messages/a", End: int64(len("Grü"))}
		said := ""
		for text, err := range stream.Text(t.Context()) {
			if err != nil {
				t.Fatal(err)
			}
			said += text
		}
		if said != c.expected {
			t.Errorf("%s: %q", name, said)
		}
	}
}
