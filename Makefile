# The commands a person types. The work is in scripts/ and in Go.

export CGO_ENABLED ?= 1
GO_BUILD = CGO_ENABLED=0 go build -trimpath

.PHONY: all build test check fuzz bench demo vagrant clean

all: build

build: ## the two binaries, static, in bin/
	$(GO_BUILD) -o bin/ ./cmd/pcpd ./cmd/pcpctl

test: ## every check, as continuous integration runs it
	scripts/test.sh

check: ## the quick part: format, vet, tests without the race detector
	test -z "$$(gofmt -l .)"
	go vet ./...
	go test ./...

fuzz: ## 1,000,000 executions of each fuzz target; takes most of an hour
	scripts/fuzz.sh

bench: ## what a request and a packet cost with 10 and with 10,000 mappings, and a restart
	go test -run '^$$' -bench 'FlatCost|Restart' -benchtime 1x ./netns_test

demo: ## a router with pcpd and real connections through it, then all is removed
	scripts/demo.sh

vagrant: ## does the Vagrantfile hold? (installs vagrant on Debian)
	scripts/vagrant-validate.sh

clean:
	rm -rf bin build
