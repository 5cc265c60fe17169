package notecase

import (
	"slices"

	notecasev1 "notecase.dev/api/notecase/v1"
)

// place is a part of a message.
type place struct {
	message string
	block   int32
}

// piece is a piece of a part's text, from the byte start on. The same bytes may arrive again, after a broken connection.
type piece struct {
	place
	start int64
	text  string
}

// text joins the pieces in a stream's events to what Stream.Text yields.
type text struct {
	after   place
	ends    map[place]int64 // how many bytes of each part were yielded
	message string          // of the last piece that was yielded
	held    []piece         // what precedes the message of after
	waits   bool            // that message is still to come
	yield   func(string) bool
}

// newText returns the text after a delta that was read before; after nil, the whole text.
func newText(after *notecasev1.BlockDelta, yield func(string) bool) *text {
	at := place{after.GetMessage(), after.GetBlock()}
	return &text{after: at, ends: map[place]int64{at: after.GetEnd()}, message: at.message, waits: at.message != "", yield: yield}
}

// add yields the new text of an event, and returns false when no more is wanted. old says that the message of after may
// still follow; the text before it is held back, and left out when it follows.
func (t *text) add(event *notecasev1.Event, pieces []piece, old bool) bool {
	if t.waits {
		about := []string{event.GetBlockDelta().GetMessage(), event.GetMessageAdded().GetName(), event.GetMessageDiscarded().GetMessage()}
		switch {
		case slices.Contains(about, t.after.message):
			t.held, t.waits = nil, false
		case old:
			t.held = append(t.held, pieces...)
			return true
		case !t.end():
			return false
		}
	}
	return t.say(pieces)
}

// end yields the text that was held back for a message that has not come.
func (t *text) end() bool {
	held := t.held
	t.held, t.waits = nil, false
	return t.say(held)
}

func (t *text) say(pieces []piece) bool {
	for _, piece := range pieces {
		if piece.message == t.after.message && piece.block < t.after.block {
			continue
		}
		have := max(t.ends[piece.place], piece.start)
		fresh := piece.text[min(have-piece.start, int64(len(piece.text))):]
		t.ends[piece.place] = max(have, piece.start+int64(len(piece.text)))
		if fresh == "" {
			continue
		}
		if t.message != "" && t.message != piece.message && !t.yield("\n\n") {
			return false
		}
		t.message = piece.message
		if !t.yield(fresh) {
			return false
		}
	}
	return true
}
