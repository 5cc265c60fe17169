package notecase

import (
	"fmt"

	notecasev1 "notecase.dev/api/notecase/v1"
)

// View is a program's position in a session's log, with the unfinished messages. The zero View is before the first
// event of a log.
type View struct {
	// LastSequence is the sequence of the newest applied event of the log, after which to attach again.
	LastSequence int64
	// Open has the blocks of unfinished messages, by message name and index of the part.
	Open map[string]map[int32]*Block

	anywhere bool              // the first event may have any sequence
	writers  map[string]string // the run that makes each open message
}

// Block is one part of an unfinished message.
type Block struct {
	// Kind is "text", "json", "reasoning", "arguments" or "refusal".
	Kind string
	Text string
	// CallID and Tool name the call of the arguments.
	CallID, Tool string
}

// Gap says that something is missing before an event: attach again after View.LastSequence.
type Gap struct{ message string }

func (g *Gap) Error() string { return "notecase: " + g.message }

// Attach takes the first frame of a stream. It forgets the open blocks, which the stream sends again from their start.
func (v *View) Attach(*notecasev1.Attached) {
	v.Open, v.writers = map[string]map[int32]*Block{}, map[string]string{}
}

// Apply takes the next event and reports whether it was new: an event of the log that was applied before is ignored.
// When an event or a piece of a block is missing before it, it returns a *Gap and does not change the view.
func (v *View) Apply(event *notecasev1.Event) (bool, error) {
	if v.Open == nil {
		v.Attach(nil)
	}
	if event.Sequence != 0 {
		if v.anywhere {
			v.LastSequence, v.anywhere = event.Sequence-1, false
		}
		if event.Sequence <= v.LastSequence {
			return false, nil
		}
		if event.Sequence != v.LastSequence+1 {
			return false, &Gap{fmt.Sprintf("event %d came after %d", event.Sequence, v.LastSequence)}
		}
		v.LastSequence = event.Sequence
	}
	switch payload := event.Payload.(type) {
	case *notecasev1.Event_BlockDelta:
		if err := v.grow(payload.BlockDelta); err != nil {
			return false, err
		}
		v.writers[payload.BlockDelta.Message] = event.Run
	case *notecasev1.Event_MessageDiscarded:
		v.close(payload.MessageDiscarded.Message)
	case *notecasev1.Event_MessageAdded:
		v.close(payload.MessageAdded.Name)
	case *notecasev1.Event_RunStateChanged:
		for message, writer := range v.writers {
			if writer == event.Run || writer == "" || event.Run == "" {
				v.close(message)
			}
		}
	}
	return true, nil
}

func (v *View) close(message string) {
	delete(v.Open, message)
	delete(v.writers, message)
}

func (v *View) grow(delta *notecasev1.BlockDelta) error {
	kind, piece := read(delta)
	if kind == "" { // of a kind that this version does not know
		return nil
	}
	block := v.Open[delta.Message][delta.Block]
	if delta.Start == 0 {
		block = &Block{Kind: kind, CallID: delta.CallId, Tool: delta.Tool}
	}
	if block == nil || int64(len(block.Text)) != delta.Start || delta.Start+int64(len(piece)) != delta.End {
		return &Gap{fmt.Sprintf("bytes %d to %d of block %d do not fit what came before", delta.Start, delta.End, delta.Block)}
	}
	block.Text += piece
	if v.Open[delta.Message] == nil {
		v.Open[delta.Message] = map[int32]*Block{}
	}
	v.Open[delta.Message][delta.Block] = block
	return nil
}

// read returns what a delta adds, and to which kind of block.
func read(delta *notecasev1.BlockDelta) (kind, piece string) {
	switch delta := delta.GetDelta().(type) {
	case *notecasev1.BlockDelta_Text:
		return "text", delta.Text
	case *notecasev1.BlockDelta_Json:
		return "json", delta.Json
	case *notecasev1.BlockDelta_Reasoning:
		return "reasoning", delta.Reasoning
	case *notecasev1.BlockDelta_Arguments:
		return "arguments", delta.Arguments
	case *notecasev1.BlockDelta_Refusal:
		return "refusal", delta.Refusal
	}
	return "", ""
}
