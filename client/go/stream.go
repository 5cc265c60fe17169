package notecase

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"iter"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	notecasev1 "notecase.dev/api/notecase/v1"
)

// Stream follows a run or a session. Events and Text attach, and attach again after the last event that they yielded
// when the connection breaks, the server restarts, or the token expires and Options.Token has a new one. Leaving the
// loop or cancelling the context ends only the stream: the run continues.
//
// A Stream is used by one goroutine, and is followed once.
type Stream struct {
	// View is the session's progress according to the events yielded so far.
	View View
	// Attached is the first frame of the newest stream. Before the stream has attached, it has the session and the run that
	// Start has started, and is nil after Watch.
	Attached *notecasev1.Attached
	// After, if set before Text is called, is the last delta of an earlier stream that the program has shown: Text begins
	// after its End, and leaves out the messages before that one. Message, Block and End are enough.
	After *notecasev1.BlockDelta
	// OnAttached, if set, is called each time the stream has attached, before the events that follow. Attached.Run then
	// has the pending calls and inputs: a run that is WAITING may send no event until one of them is answered.
	OnAttached func(*notecasev1.Attached)
	// Backoff configures how it attaches again, counted from the last received event of the log.
	Backoff Backoff

	runs    notecasev1.RunServiceClient
	request *notecasev1.WatchEventsRequest
}

// Start starts a run and returns the stream of its events. It repeats the start, which takes effect once, while the
// server is unavailable, and returns an *Error if the server refuses it.
func Start(ctx context.Context, connection grpc.ClientConnInterface, start *notecasev1.StartRun) (*Stream, error) {
	runs := notecasev1.NewRunServiceClient(connection)
	request := &notecasev1.CreateRunRequest{Start: start, RequestId: rand.Text()}
	var run *notecasev1.Run
	err := Backoff{}.Repeat(ctx, func(ctx context.Context) (err error) {
		run, err = runs.CreateRun(ctx, request)
		return err
	})
	if err != nil {
		return nil, err
	}
	watch := &notecasev1.WatchEventsRequest{
		Name: run.Name, AfterSequence: proto.Int64(max(run.FirstSequence-1, 0)), Options: start.Options,
	}
	stream := Watch(connection, watch)
	session, _, _ := strings.Cut(run.Name, "/runs/")
	stream.Attached = &notecasev1.Attached{Session: session, Run: run, LastSequence: run.LastSequence}
	return stream, nil
}

// Watch returns the stream of a run or of a session, as WatchEvents describes it. To continue a stream of another
// process, set AfterSequence to its View.LastSequence, and IfSessionUid to its Attached.SessionUid, so that a session that
// was created again under the name is not taken for it. Text then yields an unfinished message from its beginning, unless
// Stream.After is set.
func Watch(connection grpc.ClientConnInterface, request *notecasev1.WatchEventsRequest) *Stream {
	stream := &Stream{
		runs:    notecasev1.NewRunServiceClient(connection),
		request: proto.CloneOf(request),
	}
	stream.View.LastSequence = request.GetAfterSequence()
	stream.View.anywhere = request.AfterSequence == nil
	return stream
}

// Events yields the events of the log in the order of their sequence, each once, and transient events (sequence 0)
// between them. After the stream has attached again, open blocks are sent again from their start; View handles that. It
// ends with the run; with keep_open, and for a session, it ends as WatchEvents does. An error is the last pair: an
// *Error, or the context's.
func (s *Stream) Events(ctx context.Context) iter.Seq2[*notecasev1.Event, error] {
	return func(yield func(*notecasev1.Event, error) bool) {
		failures, refused, begun := 0, false, time.Now()
		for {
			took := func(event *notecasev1.Event) bool {
				if event.Sequence != 0 {
					failures, refused = 0, false
				}
				return yield(event, nil)
			}
			err := s.follow(ctx, took, func() { failures, begun = 0, time.Now() })
			if err == nil {
				return
			}
			told := AsError(err)
			worth := told.tls == tlsSuspected && s.Attached != nil // the server was reached before
			if gap := (*Gap)(nil); errors.As(err, &gap) {
				worth = true
			} else if told.Code == codes.Unauthenticated && !refused && s.Attached != nil {
				worth, refused = true, true // the next call may have another token
			} else if told.Code == codes.ResourceExhausted && (told.RetryAfter > 0 || told.Reason == "") {
				worth = true // it read too slowly, or there are too many calls for the moment
			}
			if err := s.Backoff.wait(ctx, failures, told, worth); err != nil {
				yield(nil, err)
				return
			}
			if !told.isDraining(begun) {
				failures++
			}
		}
	}
}

// follow attaches once. It returns nil at the right end of the stream, and when the events are no longer wanted.
func (s *Stream) follow(ctx context.Context, take func(*notecasev1.Event) bool, alive func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	request := proto.CloneOf(s.request)
	if !s.View.anywhere {
		request.AfterSequence = proto.Int64(s.View.LastSequence)
	}
	if uid := s.Attached.GetSessionUid(); uid != "" {
		request.IfSessionUid = uid // a session that was created again under the name is another one
	}
	frames, err := s.runs.WatchEvents(ctx, request)
	if err != nil {
		return err
	}
	for {
		frame, err := frames.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch frame := frame.Frame.(type) {
		case *notecasev1.RunResponse_Attached:
			s.attach(frame.Attached)
		case *notecasev1.RunResponse_Heartbeat:
			alive()
		case *notecasev1.RunResponse_Batch:
			for _, event := range frame.Batch.Events {
				fresh, err := s.View.Apply(event)
				if err != nil {
					return err
				}
				if fresh && !take(event) {
					return nil
				}
			}
		}
	}
}

func (s *Stream) attach(attached *notecasev1.Attached) {
	if s.View.anywhere && s.request.Name == attached.Session { // such a stream begins at the head of the session
		s.View.LastSequence, s.View.anywhere = attached.LastSequence, false
	}
	s.Attached = attached
	s.View.Attach(attached)
	if s.OnAttached != nil {
		s.OnAttached(attached)
	}
}

// Text yields the agent's text in the run in pieces as they arrive; for a stream of a session, the text of all its runs.
// Joined, the pieces of one message are exactly its text. When a model call is repeated, the reply starts again as a new
// message; "\n\n" comes between two messages. An error is the last pair: that of a run that failed, an *Error with the code
// Canceled if the run was cancelled, and otherwise as with Events. The text of a session continues with the next run.
func (s *Stream) Text(ctx context.Context) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		said := newText(s.After, func(piece string) bool { return yield(piece, nil) })
		for event, err := range s.Events(ctx) {
			if err != nil {
				yield("", err)
				return
			}
			followsRun := s.request.Name != s.Attached.Session
			if followsRun && event.Run != s.Attached.GetRun().GetName() {
				continue // the events of a queued run include those of the runs before it
			}
			delta, message, state := event.GetBlockDelta(), event.GetMessageAdded(), event.GetRunStateChanged()
			var pieces []piece
			if text := delta.GetText() + delta.GetJson(); text != "" {
				pieces = []piece{{place{delta.Message, delta.Block}, delta.Start, text}}
			} else if message.GetRole() == notecasev1.Message_ROLE_ASSISTANT {
				// A reply that was whole before the stream came has no deltas, nor has any with durable_only.
				for block, part := range message.Parts {
					pieces = append(pieces, piece{place{message.Name, int32(block)}, 0, part.GetText() + part.GetJson()})
				}
			}
			if !said.add(event, pieces, s.isOld(event)) {
				return
			}
			if err := unsuccessful(event.Run, state.GetState(), state.GetError()); err != nil && followsRun {
				if said.end() {
					yield("", err)
				}
				return
			}
		}
		if !said.end() {
			return
		}
		// A stream that attached after the run's end has no event of it.
		run := s.Attached.GetRun()
		if err := unsuccessful(run.GetName(), run.GetState(), run.GetError()); err != nil && run.GetName() == s.request.Name {
			yield("", err)
		}
	}
}

// isOld reports whether an event precedes the deltas of the message that was unfinished when the stream attached.
func (s *Stream) isOld(event *notecasev1.Event) bool {
	if event.GetBlockDelta() != nil {
		return false
	}
	last := s.Attached.GetLastSequence()
	return event.Sequence < last || event.Sequence == last && s.Attached.GetRun().GetState() == notecasev1.Run_STATE_RUNNING
}

// unsuccessful returns the error of a run that failed or was cancelled, otherwise nil.
func unsuccessful(run string, state notecasev1.Run_State, failure *notecasev1.Error) *Error {
	switch state {
	case notecasev1.Run_STATE_FAILED:
		return FromProto(failure)
	case notecasev1.Run_STATE_CANCELLED:
		return &Error{Code: codes.Canceled, Message: run + " was cancelled.", ofRun: true}
	}
	return nil
}
