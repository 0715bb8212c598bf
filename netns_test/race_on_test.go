//go:build race

package netns_test

// buildFlags: the programs under test are built as the tests are.
var buildFlags = []string{"-race"}
