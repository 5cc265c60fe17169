// Package notecase connects Go programs to a notecase server: it opens the connection, follows a run or a session
// across lost connections, joins the deltas of replies, and reads errors.
//
// The messages and stubs are in notecase.dev/api/notecase/v1. They work without this package.
package notecase

import (
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

// Options configure the connection to a server.
type Options struct {
	// Token returns the token of a call, and is called before each call. Nil: no token. See StaticToken.
	Token func(context.Context) (string, error)
	// CA names a PEM file of CA certificates for the server's certificate, and turns TLS on. Empty: those of the system.
	CA string
	// Plaintext connects to another machine without TLS. The token is then sent unencrypted, too.
	Plaintext bool
}

// StaticToken returns an Options.Token that always returns the same token.
func StaticToken(token string) func(context.Context) (string, error) {
	return func(context.Context) (string, error) { return token, nil }
}

// FromEnvironment returns the address in NOTECASE_ADDRESS (127.0.0.1:7420 if it is not set), and options with the token
// in NOTECASE_TOKEN and the CA certificates in NOTECASE_CA.
func FromEnvironment() (string, Options) {
	options := Options{CA: os.Getenv("NOTECASE_CA")}
	if token := os.Getenv("NOTECASE_TOKEN"); token != "" {
		options.Token = StaticToken(token)
	}
	if address := os.Getenv("NOTECASE_ADDRESS"); address != "" {
		return address, options
	}
	return "127.0.0.1:7420", options
}

// Dial returns a connection for the stubs. The address is HOST:PORT, or a target of grpc-go such as unix:PATH. It uses
// TLS, except to a loopback address without Options.CA and with Options.Plaintext. It returns an error for an invalid
// address and for a CA file that cannot be read; the first call connects to the server. The errors of calls are *Error.
func Dial(address string, options Options, more ...grpc.DialOption) (*grpc.ClientConn, error) {
	if !isTarget(address) {
		return nil, fmt.Errorf("notecase: the address %q (see NOTECASE_ADDRESS) must be HOST:PORT", address)
	}
	local := isLoopback(address)
	if options.Plaintext && options.CA != "" {
		return nil, fmt.Errorf("notecase: Plaintext and CA exclude each other")
	}
	secure := options.CA != "" || !local && !options.Plaintext
	transport := insecure.NewCredentials()
	if secure {
		pool, err := authorities(options.CA)
		if err != nil {
			return nil, err
		}
		transport = credentials.NewClientTLSFromCert(pool, "")
	}
	dial := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithChainUnaryInterceptor(unaryErrors),
		grpc.WithChainStreamInterceptor(streamErrors),
		// Notices a server that vanished. The server allows a ping every 10 s.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: 20 * time.Second, Timeout: 10 * time.Second, PermitWithoutStream: true,
		}),
	}
	if local {
		dial = append(dial, grpc.WithNoProxy())
	}
	if options.Token != nil {
		dial = append(dial, grpc.WithPerRPCCredentials(token{options.Token, secure}))
	}
	return grpc.NewClient(address, append(dial, more...)...)
}

type token struct {
	get    func(context.Context) (string, error)
	secure bool
}

func (t token) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	value, err := t.get(ctx)
	if _, ofCall := status.FromError(err); err != nil && ofCall {
		return nil, err
	} else if err != nil { // it may have asked somebody who is away for a moment
		return nil, status.Error(codes.Unavailable, "no token: "+err.Error())
	}
	value = strings.TrimSpace(value)
	if value == "" || strings.ContainsFunc(value, func(char rune) bool { return char <= ' ' || char > '~' }) {
		return nil, status.Error(codes.Unauthenticated, "the token (see NOTECASE_TOKEN) must be printable ASCII without spaces")
	}
	return map[string]string{"authorization": "Bearer " + value}, nil
}

func (t token) RequireTransportSecurity() bool { return t.secure }

// authorities returns those in a PEM file; nil, which means the system's, without a file.
func authorities(path string) (*x509.CertPool, error) {
	if path == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("notecase: the CA file (see NOTECASE_CA): %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("notecase: the CA file (see NOTECASE_CA) %s has no certificate in PEM format", path)
	}
	return pool, nil
}

func isTarget(address string) bool {
	if strings.HasPrefix(address, "unix:") || strings.Contains(address, ":///") {
		return true
	}
	host, port, err := net.SplitHostPort(address)
	number, wrong := strconv.ParseUint(port, 10, 16)
	return err == nil && wrong == nil && number > 0 && host != "" && !strings.Contains(host, "/")
}

func isLoopback(address string) bool {
	if strings.HasPrefix(address, "unix:") {
		return true
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}
