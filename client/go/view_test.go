package notecase

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	notecasev1 "notecase.dev/api/notecase/v1"
)

type vector struct {
	After   int64                        `json:"after"`
	Printed map[string]map[string]string `json:"printed"`
	Steps   []struct {
		Attached json.RawMessage `json:"attached"`
		Event    json.RawMessage `json:"event"`
		Gives    string          `json:"gives"`
		View     *struct {
			LastSequence int64                       `json:"lastSequence"`
			Open         map[string]map[int32]*Block `json:"open"`
		} `json:"view"`
	} `json:"steps"`
}

// The vectors are those of every client; their README is beside them.
func TestVectors(t *testing.T) {
	paths, err := filepath.Glob(filepath.Join("..", "..", "tests", "vectors", "*.json"))
	if err != nil || len(paths) == 0 {
		t.Fatal("there are no vectors", err)
	}
	for _, path := range paths {
		t.Run(filepath.Base(path), func(t *testing.T) {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			var vector vector
			if err := json.Unmarshal(text, &vector); err != nil {
				t.Fatal(err)
			}
			play(t, vector)
		})
	}
}

func play(t *testing.T, vector vector) {
	view := View{LastSequence: vector.After}
	printed := map[string]map[string]string{} // of whole messages, what their deltas were
	for number, step := range vector.Steps {
		if step.Attached != nil {
			attached := &notecasev1.Attached{}
			parse(t, step.Attached, attached)
			view.Attach(attached)
		} else {
			event := &notecasev1.Event{}
			parse(t, step.Event, event)
			if name := event.GetMessageAdded().GetName(); view.Open[name] != nil {
				printed[name] = texts(view.Open[name])
			}
			if gives := apply(t, &view, event); gives != step.Gives {
				t.Errorf("step %d gives %s, not %s", number, gives, step.Gives)
			}
		}
		if step.View == nil {
			continue
		}
		if view.LastSequence != step.View.LastSequence {
			t.Errorf("step %d: the last sequence is %d, not %d", number, view.LastSequence, step.View.LastSequence)
		}
		if len(view.Open)+len(step.View.Open) > 0 && !reflect.DeepEqual(view.Open, step.View.Open) {
			t.Errorf("step %d: open are %v, not %v", number, view.Open, step.View.Open)
		}
	}
	for name, blocks := range view.Open {
		printed[name] = texts(blocks)
	}
	if vector.Printed != nil && !reflect.DeepEqual(printed, vector.Printed) {
		t.Errorf("printed are %v, not %v", printed, vector.Printed)
	}
}

func apply(t *testing.T, view *View, event *notecasev1.Event) string {
	fresh, err := view.Apply(event)
	if gap := (*Gap)(nil); errors.As(err, &gap) {
		return "gap"
	}
	if err != nil {
		t.Fatal(err)
	}
	if fresh {
		return "new"
	}
	return "known"
}

func texts(blocks map[int32]*Block) map[string]string {
	found := map[string]string{}
	for index, block := range blocks {
		number, _ := json.Marshal(index)
		found[string(number)] = block.Text
	}
	return found
}

func parse(t *testing.T, text json.RawMessage, message proto.Message) {
	if err := protojson.Unmarshal(text, message); err != nil {
		t.Fatal(err)
	}
}
