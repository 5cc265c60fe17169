package notecase

import (
	"context"
	"encoding/pem"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	notecasev1 "notecase.dev/api/notecase/v1"
)

func TestAnAddressIsHostAndPort(t *testing.T) {
	for _, address := range []string{"", "localhost", "https://localhost:7420", "localhost:", ":7420", "localhost:http", "localhost:70000"} {
		if _, err := Dial(address, Options{}); err == nil || !strings.Contains(err.Error(), "must be HOST:PORT") {
			t.Error(address, err)
		}
	}
	for _, address := range []string{"localhost:7420", "[::1]:7420", "unix:/run/notecase", "dns:///notecase.example:7420"} {
		if connection, err := Dial(address, Options{}); err != nil {
			t.Error(address, err)
		} else {
			connection.Close()
		}
	}
}

func TestAFailureOfTLSIsNotRepeatedForLong(t *testing.T) {
	secure := httptest.NewUnstartedServer(nil)
	secure.EnableHTTP2 = true
	secure.StartTLS()
	defer secure.Close()
	address := secure.Listener.Addr().String()
	elsewhere := grpc.WithAuthority("elsewhere.example")
	ca := filepath.Join(t.TempDir(), "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw})
	if err := os.WriteFile(ca, block, 0o600); err != nil {
		t.Fatal(err)
	}
	plain := serve(t, &scripted{}, Options{})
	for name, test := range map[string]struct {
		address string
		options Options
		more    []grpc.DialOption
		calls   int
		hint    string
	}{
		"a certificate for another host":   {address, Options{CA: ca}, []grpc.DialOption{elsewhere}, 1, certificateHint},
		"TLS to a server without it":       {plain.Target(), Options{CA: ca}, nil, 1, tlsHint},
		"plain text to a server with TLS":  {address, Options{}, nil, 7, tlsHint},
		"no server, which may come up yet": {"127.0.0.1:1", Options{}, nil, 11, ""},
	} {
		connection, err := Dial(test.address, test.options, test.more...)
		if err != nil {
			t.Fatal(err)
		}
		defer connection.Close()
		calls := 0
		failed := AsError(Backoff{First: time.Microsecond}.Repeat(t.Context(), func(ctx context.Context) error {
			calls++
			_, err := notecasev1.NewRunServiceClient(connection).GetRun(ctx, &notecasev1.GetRunRequest{})
			return err
		}))
		hinted := strings.Contains(failed.Message, "NOTECASE_CA")
		if failed.Code != codes.Unavailable || calls != test.calls || !strings.HasSuffix(failed.Message, test.hint) || hinted != (test.hint != "") {
			t.Errorf("%s: %d calls, %v", name, calls, failed)
		}
	}
}
